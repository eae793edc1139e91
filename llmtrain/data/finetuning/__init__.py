"""Fine-tuning: conversations -> tokenized examples with a mask -> packed batches."""
