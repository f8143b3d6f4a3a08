"""Chains of commands: their stages, how these run, and the report at the end."""
