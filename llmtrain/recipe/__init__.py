"""The training recipe: every key that a training YAML may hold."""
