"""The few operations whose speed decides everything: products, attention, cache writes, noise."""
