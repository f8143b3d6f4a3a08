"""Names to weights."""
