"""A target and, if there is one, its draft model, read from their directories."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import tokenizers as hf_tokenizers

from specjax.data import tokenizers
from specjax.models import hf
from specjax.models.transformer import transformer
from specjax.types import Model, PyTree

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Checkpoints(NamedTuple):
    """All that decoding needs of two directories."""

    tokenizer: hf_tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    context: int  # tokens that every model has positions for
    target: Model
    target_params: PyTree
    draft: Model | None
    draft_params: PyTree  # () where there is no draft


def load(target: str | Path, draft: str | Path = "", dtype: str = "float32") -> Checkpoints:
    """Reads Hugging Face directories.

    Args:
        target: its tokenizer.json and special ids are used.
        draft: may be empty.
        dtype: "float32" or "bfloat16", of weights, activations and caches.

    Raises:
        ValueError: a directory that cannot be read, another dtype, vocabularies that differ.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; need one of {', '.join(_DTYPES)}.")
    if not target:
        raise ValueError("No target was given; need --config.target=DIRECTORY.")
    hf.load_config(target)  # says what is wrong with a directory better than its tokenizer can
    if draft:
        hf.check_same_vocabulary(target, draft)
    tokenizer = tokenizers.load(target)
    kind = _DTYPES[dtype]
    found = hf.load(target, kind)
    if tokenizer.get_vocab_size() > found.config.vocab_size:
        raise ValueError(
            f"{target} has {tokenizer.get_vocab_size()} tokens in tokenizer.json but a model of "
            f"{found.config.vocab_size}; need a tokenizer of this model."
        )
    context = found.config.max_position_embeddings
    draft_model, draft_params = None, ()
    if draft:
        drafted = hf.load(draft, kind)
        context = min(context, drafted.config.max_position_embeddings)
        draft_model, draft_params = transformer(drafted.config, kind), drafted.params
    return Checkpoints(
        tokenizer,
        found.eos_ids,
        context,
        transformer(found.config, kind),
        found.params,
        draft_model,
        draft_params,
    )
