"""Text, tokenizers, rows and resumable batches for training and evaluation."""
