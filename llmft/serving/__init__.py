"""Runs that answer: one engine for the terminal and for the network."""
