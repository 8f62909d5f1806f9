"""Plain language modelling: cross-entropy of the next token."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.models import hf
from specjax.models.transformer import TransformerConfig, forward, transformer
from specjax.objectives import Batch, Objective, options
from specjax.objectives.teacher import mean
from specjax.types import Array, Model, PyTree


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Nats [...] of labels [...] under logits [..., V], in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


class Trainee(NamedTuple):
    """A whole language model to be trained."""

    model: Model
    init: Callable  # (rng_key, target_params) -> params, float32
    export: Callable  # (directory, params, eos_ids, bos_id)


def trainee(objective: str, c: SimpleNamespace) -> Trainee:
    """The model that an objective's options `model`, `initial`, `remat` and `dtype` describe.

    With `initial`, a directory, the model has that one's shape, of which `model` may repeat
    anything, and starts from its weights.

    Raises:
        ValueError: a field that does not exist, is missing, or is not that of `initial`; a type
            that is neither float32 nor bfloat16; as `hf.load_config` and `transformer`.
    """
    fields = dict(c.model)
    if c.initial:
        config = hf.load_config(c.initial)
        for name, value in fields.items():
            if hasattr(config, name) and getattr(config, name) != value:
                raise ValueError(
                    f"The model of {objective} has {name} {value} but {c.initial}, from which it "
                    f"starts, {getattr(config, name)}; they must be the same."
                )
        fields = {**vars(config), **fields}
    try:
        config = TransformerConfig(**fields)
    except TypeError as error:
        raise ValueError(f"The model of {objective} has {sorted(fields)}: {error}.") from error
    if c.dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype of {objective} is {c.dtype}; need float32 or bfloat16.")

    def init(rng_key: Array, target_params: PyTree) -> PyTree:
        del target_params
        if c.initial:
            return hf.load(c.initial, jnp.float32).params
        return transformer(config).init(rng_key)

    def export(
        directory: str, params: PyTree, eos_ids: Sequence[int] = (), bos_id: int | None = None
    ) -> None:
        hf.save(directory, config, params, jnp.bfloat16, eos_ids, bos_id)

    return Trainee(transformer(config, jnp.dtype(c.dtype), remat=c.remat), init, export)


def next_token(config: Mapping[str, Any], target: Model | None = None) -> Objective:
    """Trains a model on text; no target is involved.

    Args:
        config: `model`, the fields of its `TransformerConfig`; `initial`, a directory to start from
            (""); `remat`, see `transformer` (False); `dtype` of activations (float32).
        target: not used.

    Raises:
        ValueError: an option that does not exist; as `trainee`.
    """
    del target
    c = options("next_token", config, model={}, initial="", remat=False, dtype=jnp.float32)
    model, init, export = trainee("next_token", c)

    def loss(
        params: PyTree, target_params: PyTree, batch: Batch, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del target_params, rng_key
        logits = forward(model, params, batch.tokens[:, :-1]).logits
        nats = mean(cross_entropy(logits, batch.tokens[:, 1:]), batch.weights)
        return nats, {"cross_entropy": nats}

    return Objective(init, loss, export, student=model)
