"""The resume certificate: a run that is killed again and again, compared bit for bit with one that is not."""
