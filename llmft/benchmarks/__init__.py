"""Measures how fast models train and generate on this machine, with estimates for a workload."""
