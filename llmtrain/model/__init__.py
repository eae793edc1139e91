"""MPT in plain torch: token ids to logits, or to a loss. Imports neither Composer nor transformers.

`config.py` and `flops.py` do not import torch, so that recipes validate and count without it.
"""
