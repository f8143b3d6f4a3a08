"""A run's directory: its key, lock, status, checkpoints and predictions."""
