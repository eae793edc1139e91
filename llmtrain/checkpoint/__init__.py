"""Weights in and out: checkpoints, manifests, Hugging Face folders."""
