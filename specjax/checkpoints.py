"""A target and its drafts, models and heads, read from their directories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as hf_tokenizers
from ml_collections import ConfigDict

from specjax import devices
from specjax.build import build, mentions
from specjax.data import tokenizers
from specjax.kernels import native
from specjax.models import hf, hf_heads, intersection
from specjax.models.eagle import EagleHead
from specjax.models.medusa import MedusaHeads
from specjax.models.transformer import TransformerConfig, transformer
from specjax.types import Array, Cache, Model, Params, PyTree

_DTYPES = {"auto": jnp.float32, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Drafting(NamedTuple):
    """Something to draft with."""

    model: Model | hf_heads.Heads
    params: PyTree
    num_common: int | None = None  # tokens shared with the target, where vocabularies differ


class Checkpoints(NamedTuple):
    """All that decoding needs of a target's directory and its drafts'."""

    tokenizer: hf_tokenizers.Tokenizer
    eos_ids: tuple[int, ...]
    context: int  # tokens that every model has positions for
    target: Model
    target_params: PyTree
    drafts: dict[str, Drafting]  # by name


def load(
    target: str | Path,
    drafts: Mapping[str, str | Path] | ConfigDict | str | Path = "",
    dtype: str = "auto",
    cache_dtype: str = "auto",
) -> Checkpoints:
    """Reads directories of Hugging Face models and of heads, see `hf` and `hf_heads`.

    A draft model of another vocabulary drafts what both have, see `intersection`.

    Args:
        target: its tokenizer.json and special ids are used.
        drafts: by name; a single one is called "draft", and an empty one is none.
        dtype: "float32" or "bfloat16", of weights and activations; "auto" is float32, but keeps
            weights that are stored in bfloat16 so where the CPU's kernels read them: all values are
            the same, and half as many bytes move.
        cache_dtype: "float32" or "bfloat16", of caches; "auto" is that of activations.

    Raises:
        ValueError: a directory that cannot be read, another dtype, heads of another vocabulary or
            hidden size, a draft model of hardly any common token, a draft called "target".
    """
    for name, value in (("dtype", dtype), ("cache_dtype", cache_dtype)):
        if value not in _DTYPES:
            raise ValueError(f"{name} is {value!r}; need one of {', '.join(_DTYPES)}.")
    kind = _DTYPES[dtype]
    of_cache = kind if cache_dtype == "auto" else _DTYPES[cache_dtype]
    if not target:
        raise ValueError("No target was given; need a directory.")
    config = hf.load_config(target)  # says what is wrong better than its tokenizer can
    named = {"draft": drafts} if isinstance(drafts, (str, Path)) else dict(drafts.items())
    if "target" in named:
        raise ValueError(f"A draft, {named['target']}, is called 'target'; need another name.")
    directories = {name: directory for name, directory in named.items() if directory}
    for directory in directories.values():
        if hf_heads.kind(directory) != "model":
            hf.check_same_tokens(target, directory)
    tokenizer = tokenizers.load(target)
    # Added tokens may lie beyond: Gemma 3's tokenizer has one for images, its text models do not.
    num_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"{target} has {num_tokens} tokens in tokenizer.json but a model of "
            f"{config.vocab_size}; need a tokenizer of this model."
        )
    found, context = {}, config.max_position_embeddings
    for name, directory in directories.items():
        draft, shape = _draft(directory, config, dtype, of_cache)
        if shape is not None:
            context = min(context, shape.max_position_embeddings)
        if isinstance(draft.model, Model):
            own = _own_ids(draft.model, tokenizer, config.vocab_size, target, directory)
            if own is not None:
                common = int((own >= 0).sum())
                model = intersection.intersected(draft.model, own)
                draft = Drafting(model, draft.params, common)
        found[name] = draft
    read = hf.load(target, _stored(dtype, hf.stored_dtype(target)))
    return Checkpoints(
        tokenizer,
        read.eos_ids,
        context,
        transformer(config, kind, feature_layers(found), of_cache),
        _widened(read.params, dtype),
        found,
    )


def given(target: Model, drafts: Mapping[str, Drafting]) -> dict[str, Any]:
    """What "@target" and "@" with a draft's name stand for in a config."""
    return {"target": target, **{name: draft.model for name, draft in drafts.items()}}


def params(
    target_params: PyTree,
    drafts: Mapping[str, Drafting],
    drafter: Any,
    weights: Any = None,
    target: Model | None = None,
) -> Params:
    """The weights of the target and of a drafter.

    Args:
        target_params: the target's.
        drafts: by name.
        drafter: its spec.
        weights: a spec of the drafter's, in which "@target_params" and, with any draft's name,
            "@draft_params" stand for theirs. By default those of the draft that `drafter` mentions,
            if it does.
        target: what "@target" stands for in it.

    Raises:
        ValueError: without `weights`, a drafter that mentions several drafts.
    """
    if weights is not None:
        named = {"target": target, "target_params": target_params}
        named |= {f"{name}_params": draft.params for name, draft in drafts.items()}
        return Params(target_params, build(weights, **named))
    mentioned = [name for name in drafts if mentions(drafter, name)]
    if len(mentioned) > 1:
        raise ValueError(
            f"A drafter mentions @{' and @'.join(mentioned)}; it has weights of one draft, or else "
            "its config has to say which."
        )
    return Params(target_params, drafts[mentioned[0]].params if mentioned else ())


def feature_layers(drafts: Mapping[str, Drafting]) -> tuple[int, ...]:
    """The target's layers that the drafts read."""
    heads = [draft.model for draft in drafts.values() if isinstance(draft.model, EagleHead)]
    return tuple(sorted(set().union(*(head.feature_layers for head in heads))))


def _draft(
    directory: str | Path, target: TransformerConfig, dtype: str, cache_dtype: Any
) -> tuple[Drafting, TransformerConfig | None]:
    """A draft and the shape of its layers, if it has any."""
    kind = _DTYPES[dtype]
    if hf_heads.kind(directory) == "model":
        read = hf.load(directory, _stored(dtype, hf.stored_dtype(directory)))
        model = transformer(read.config, kind, cache_dtype=cache_dtype)
        return Drafting(model, _widened(read.params, dtype)), read.config
    to = _stored(dtype, hf_heads.stored_dtype(directory))
    heads, weights = hf_heads.load(directory, target, to, kind)
    weights = _widened(weights, dtype)
    if isinstance(heads, MedusaHeads):
        return Drafting(heads, weights), None
    shape = heads.config if isinstance(heads, EagleHead) else heads.prefix
    if cache_dtype != kind:
        heads = _with_cache_of(heads, cache_dtype)
    return Drafting(heads, weights), shape


def _own_ids(
    draft: Model,
    tokenizer: hf_tokenizers.Tokenizer,
    vocab_size: int,
    target: str | Path,
    directory: str | Path,
) -> np.ndarray | None:
    """The draft's ids [V] of the target's tokens, -1 for none; None where they are the same."""
    if not (Path(directory) / "tokenizer.json").is_file():
        hf.check_same_vocabulary(target, directory)
        return None
    of_draft = tokenizers.load(directory)
    common = intersection.common_tokens(tokenizer, of_draft)
    is_same = draft.vocab_size == vocab_size and of_draft.get_vocab_size() == len(common)
    if is_same and (common == np.arange(len(common))).all():
        return None
    ids = np.full(vocab_size, -1)  # the table may have more rows than there are tokens, or fewer
    common = common[:vocab_size]
    ids[: len(common)] = np.where(common < draft.vocab_size, common, -1)
    return ids


def _with_cache_of(heads: Any, dtype: Any) -> Any:
    """Heads whose cache has a dtype of its own."""

    def init_cache(batch_size: int, max_length: int) -> Cache:
        cache = heads.init_cache(batch_size, max_length)
        keys, values = jax.tree.map(lambda x: x.astype(dtype), (cache.keys, cache.values))
        return Cache(keys, values, cache.length)

    return heads._replace(init_cache=init_cache)


def _stored(dtype: str, stored: np.dtype | None) -> Any:
    """The dtype to read weights in."""
    served = devices.platform() == "cpu" and native.available()
    keeps = dtype == "auto" and stored == jnp.bfloat16 and served
    return jnp.bfloat16 if keeps else _DTYPES[dtype]


def _widened(params: PyTree, dtype: str) -> PyTree:
    """With "auto", what is no matrix in float32: it is too small to matter."""

    def widen(x: Array) -> Array:
        return x if x.ndim > 1 else x.astype(jnp.float32)

    return jax.tree.map(widen, params) if dtype == "auto" else params
