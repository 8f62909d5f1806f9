"""Text documents, tokenizers and batches for training and evaluation."""
