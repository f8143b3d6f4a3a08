"""Checks of a config, a machine and a disk."""
