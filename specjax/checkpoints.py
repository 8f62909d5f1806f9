"""A target and, if there is one, its draft model, read from their directories."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import tokenizers as hf_tokenizers

from specjax.data import tokenizers
from specjax.kernels import native
from specjax.models import hf
from specjax.models.transformer import transformer
from specjax.types import Array, Model, PyTree

_DTYPES = {"auto": jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Checkpoints(NamedTuple):
    """All that decoding needs of two directories."""

    tokenizer: hf_tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    context: int  # tokens that every model has positions for
    target: Model
    target_params: PyTree
    draft: Model | None
    draft_params: PyTree  # () where there is no draft


def load(
    target: str | Path, draft: str | Path = "", dtype: str = "auto", cache_dtype: str = "auto"
) -> Checkpoints:
    """Reads Hugging Face directories.

    Args:
        target: its tokenizer.json and special ids are used.
        draft: may be empty.
        dtype: "float32" or "bfloat16", of weights and activations; "auto" is float32, but keeps
            weights that are stored in bfloat16 so where the CPU's kernels read them: all values are
            the same, and half as many bytes move.
        cache_dtype: "float32" or "bfloat16", of caches; "auto" is that of activations.

    Raises:
        ValueError: a directory that cannot be read, another dtype, vocabularies that differ.
    """
    for name, given in (("dtype", dtype), ("cache_dtype", cache_dtype)):
        if given not in _DTYPES:
            raise ValueError(f"{name} is {given!r}; need one of {', '.join(_DTYPES)}.")
    kind = _DTYPES[dtype]
    of_cache = kind if cache_dtype == "auto" else _DTYPES[cache_dtype]
    if not target:
        raise ValueError("No target was given; need --config.target=DIRECTORY.")
    hf.load_config(target)  # says what is wrong with a directory better than its tokenizer can
    if draft:
        hf.check_same_vocabulary(target, draft)
    tokenizer = tokenizers.load(target)
    found = _read(target, dtype)
    if tokenizer.get_vocab_size() > found.config.vocab_size:
        raise ValueError(
            f"{target} has {tokenizer.get_vocab_size()} tokens in tokenizer.json but a model of "
            f"{found.config.vocab_size}; need a tokenizer of this model."
        )
    context = found.config.max_position_embeddings
    draft_model, draft_params = None, ()
    if draft:
        drafted = _read(draft, dtype)
        context = min(context, drafted.config.max_position_embeddings)
        draft_model = transformer(drafted.config, kind, cache_dtype=of_cache)
        draft_params = drafted.params
    return Checkpoints(
        tokenizer,
        found.eos_ids,
        context,
        transformer(found.config, kind, cache_dtype=of_cache),
        found.params,
        draft_model,
        draft_params,
    )


def _read(directory: str | Path, dtype: str) -> hf.Checkpoint:
    if dtype != "auto":
        return hf.load(directory, _DTYPES[dtype])
    stored = hf.stored_dtype(directory)
    served = jax.default_backend() == "cpu" and native.available()
    if stored != jnp.bfloat16 or not served:
        return hf.load(directory, jnp.float32)
    found = hf.load(directory, stored)

    def widen(x: Array) -> Array:  # what is no matrix is too small to matter
        return x if x.ndim > 1 else x.astype(jnp.float32)

    return found._replace(params=jax.tree.map(widen, found.params))
