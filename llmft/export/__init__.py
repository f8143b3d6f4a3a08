"""Exports for other programs: a transformers directory, a GGUF file, a bundle; each is compared with its run."""
