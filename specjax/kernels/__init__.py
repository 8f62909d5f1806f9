"""The few operations whose speed decides everything: products, attention, commits, noise, order."""
