"""Target and draft models: Flax modules behind `specjax.types.Model`, and their files."""
