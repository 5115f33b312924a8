"""Systems side by side on the same inputs, and the limit that none can beat."""
