"""What a run leaves behind: predictions, metrics, a timeline, a page with pictures."""
