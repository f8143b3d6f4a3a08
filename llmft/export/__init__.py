"""What was trained, for other programs: a directory of transformers, a GGUF file, a bundle; each is proved."""
