"""Sweeps: trainings that are planned, run in worker processes under a supervisor, recorded and reported together."""
