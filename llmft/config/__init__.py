"""From a command line or somebody's file to a typed config, and from a config to the objects that it names."""
