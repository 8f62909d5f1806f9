"""What the objectives of heads share: their options, and the loss of heads that look ahead."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees
from specjax.build import build
from specjax.drafters import grow
from specjax.models import hf_heads
from specjax.models.hf_heads import Heads
from specjax.models.transformer import TransformerConfig
from specjax.objectives import Batch, options
from specjax.objectives.teacher import mean, report
from specjax.types import Array, Model, PyTree


def head_options(
    name: str, config: Mapping[str, Any], target: Model | None, defaults: Mapping[str, Any]
) -> SimpleNamespace:
    """The options of an objective for heads.

    Raises:
        ValueError: no target, a temperature that is not positive, a type other than float32 and
            bfloat16, an option that does not exist.
    """
    c = options(name, config, **defaults)
    if target is None:
        raise ValueError(f"Objective {name} has no target; set config.target to a directory.")
    if c.temperature <= 0:
        raise ValueError(f"temperature of {name} is {c.temperature}; need more than 0.")
    if c.dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype of {name} is {c.dtype}; need float32 or bfloat16.")
    c.dtype = jnp.dtype(c.dtype)
    return c


def tree(num_heads: int) -> grow.Builder:
    """The likeliest tokens in 15 nodes below the root, fewer if there are fewer than four heads."""
    parents = (-1, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 5, 5, 6, 11, 11)
    depth = trees.topology(parents).depth_of
    kept = [parent for parent, d in zip(parents, depth, strict=True) if d <= num_heads]
    return grow.static(kept, grow.best())


def initial(name: str, directory: str, heads: Heads, target: Model, rng_key: Array) -> PyTree:
    """The first weights of heads: those in a directory, new ones if it is "".

    Raises:
        ValueError: other heads in the directory; as `hf_heads.load`.
    """
    if not directory:
        return heads.init(rng_key)
    found, params = hf_heads.load(directory, target, jnp.float32)
    for field, wanted in heads._asdict().items():
        there: Any = getattr(found, field, None)
        if isinstance(there, TransformerConfig) and isinstance(wanted, TransformerConfig):
            # A layer has no embeddings to tie.
            there = dataclasses.replace(there, tie_embeddings=wanted.tie_embeddings)
        if not callable(wanted) and not np.array_equal(there, wanted):
            raise ValueError(
                f"The heads of {name} have {field} {wanted} but {directory}, from which they "
                f"start, has {there}; need the same."
            )
    return params


def unembedding(target: Model, target_params: PyTree) -> Array:
    """The matrix [V, E] float32 of `target.unembed`, which the unit vectors show."""
    rows: Array = target.unembed(target_params, jnp.eye(target.hidden_size))
    return rows.T.astype(jnp.float32)


def heads_loss(c: SimpleNamespace) -> Callable:
    """Builds the weighted sum of all heads' losses from an objective's options.

    Returns:
        (predict, log_p [B, T, V], batch) -> (scalar, metrics), where predict: (k) -> logits
        [B, T, V] of tokens 1 .. T by head k, the first k + 1 of which have nothing to come from.
    """
    loss, position_weights = build(c.loss), build(c.position_weights)

    def nats(predict: Callable, log_p: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
        labels = batch.tokens[:, 1:]
        place = jnp.arange(labels.shape[1])

        def judge(k: int) -> tuple[Array, Array, Array, dict[str, Array]]:
            log_q = jax.nn.log_softmax(predict(k) / c.temperature)
            weights = jnp.where(place > k, batch.weights, 0.0)
            label = jnp.take_along_axis(log_q, labels[..., None], -1)[..., 0]
            # From the token to the position that the whole draft starts from.
            each, label, counted = (
                jnp.pad(x, ((0, 0), (0, k + 1)))[:, k + 1 :]
                for x in (loss(log_p, log_q, labels), jax.lax.stop_gradient(label), weights)
            )
            return each, label, counted, report(log_p, log_q, weights, 0)

        # A loop, for a straight line of heads would hold all their logits at once.
        @jax.checkpoint
        def one(_: None, k: Array) -> Any:
            heads = [functools.partial(judge, k) for k in range(c.num_heads)]
            return None, jax.lax.switch(k, heads)

        which = jnp.arange(c.num_heads)
        _, (each, label, weights, found) = jax.lax.scan(one, None, which)  # [K, B, T]
        share = position_weights(jnp.moveaxis(label, 0, -1), jnp.moveaxis(weights, 0, -1) > 0)
        means = jax.vmap(mean)(each * jnp.moveaxis(share, -1, 0), weights)
        metrics = {
            f"{name.removesuffix('0')}{k + 1}": values[k]
            for name, values in found.items()
            for k in range(c.num_heads)
        }
        return means.sum(), metrics

    return nats


def shifted(x: Array, n: int) -> Array:
    """Every row [B, T, E] n places later, zeros before it."""
    return jnp.pad(x, ((0, 0), (n, 0), (0, 0)))[:, : x.shape[1]]
