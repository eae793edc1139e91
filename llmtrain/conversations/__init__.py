"""Rows of any fine-tuning dataset become examples. Light: imports neither torch, transformers nor streaming."""
