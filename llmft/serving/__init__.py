"""Serves runs: one engine for the terminal and for the network."""
