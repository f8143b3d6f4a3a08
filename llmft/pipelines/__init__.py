"""Chains of commands: what stages are, how they run, and what is told of them at the end."""
