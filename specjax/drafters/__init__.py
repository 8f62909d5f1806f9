"""Generation strategies: one file per way of guessing what the target will write."""
