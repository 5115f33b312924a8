"""What would fit and how fast it would be, said before a weight is loaded; and the simulator over recorded traces."""
