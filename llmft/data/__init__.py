"""Rows to token batches."""
