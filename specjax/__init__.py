"""specjax: speculative decoding in JAX. Drafters propose, one target pass scores, verifiers keep."""

__version__ = "0.1.0"
