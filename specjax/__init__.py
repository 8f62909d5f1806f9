"""Speculative decoding in JAX: drafters propose, one target pass scores, verifiers keep."""

__version__ = "0.1.0"
