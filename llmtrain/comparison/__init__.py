"""Runs side by side: losses, evaluations, speed, recipes. Reads what runs leave on disk; imports no torch."""
