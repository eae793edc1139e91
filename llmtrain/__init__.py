"""llmtrain: pretrain and fine-tune MPT-style language models from YAML recipes."""

__version__ = "0.1.0"
