"""Text: reading it, tokens of it on disk, batches of windows and of examples."""
