"""Any causal language model of Hugging Face transformers, trained like MPT."""
