"""A package of somebody else's: what a user of llmft adds, each part in one file."""
