"""YAML files become validated, typed, frozen configs. Knows nothing of models or training."""
