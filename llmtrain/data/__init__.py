"""Shards become batches."""
