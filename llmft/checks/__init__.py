"""Before a training: a config, a machine and a disk, looked at."""
