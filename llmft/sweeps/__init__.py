"""Several trainings: planned, run in worker processes under a supervisor, recorded and reported as one sweep."""
