"""Speculative decoding in JAX: drafters propose, one target pass scores, verifiers keep."""

__version__ = "0.1.0"

from specjax.generation import Generation, LanguageModel, generate, load

__all__ = ["Generation", "LanguageModel", "generate", "load"]
