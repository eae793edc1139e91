"""Tokens become logits and a loss: the MPT family in plain torch."""
