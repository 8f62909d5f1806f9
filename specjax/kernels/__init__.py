"""The few operations whose speed decides everything: matrix products and attention."""
