"""Helpers for tests: gloo ranks, tiny models, tiny corpora. Shipped, so that plugins can be tested with them."""
