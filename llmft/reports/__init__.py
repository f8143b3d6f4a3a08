"""Runs in, pages out: what a set of runs says, and whether a difference is more than noise."""
