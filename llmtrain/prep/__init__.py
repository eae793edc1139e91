"""Raw text becomes MDS shards. Imports neither torch nor streaming, so that it starts at once."""
