"""A user's package: extensions of llmft, each part in one file."""
