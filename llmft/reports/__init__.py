"""Reports on a set of runs: tables, figures, and whether differences exceed the noise."""
