"""Medusa's heads: small residual networks that all read one feature of the target.

Cai et al., arXiv 2401.10774, section 2.1: p_k = softmax(W2_k (SiLU(W1_k h) + h)), where head k
predicts the token k + 1 places after the one that h itself predicts, W1_k starts as zero and W2_k
as the target's unembedding. Here W2_k may also stay the target's, which costs no weights.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from specjax.kernels.linear import linear, linears
from specjax.types import Array, Model, PyTree


class MedusaHeads(NamedTuple):
    """Pure functions of K heads. `which` names the heads meant, by default all of them."""

    init: Callable  # (rng_key) -> params; every head passes the feature on
    hidden: Callable  # (params, feature [..., E], which=None) -> [..., K, E]
    unembed: Callable  # (params, target, target_params, hidden [..., K, E], which=None)
    #                    -> logits [..., K, V] float32
    hidden_size: int  # the target's
    num_heads: int
    num_layers: int  # residual blocks of each head
    own_unembedding: bool  # each head has a matrix of its own in place of the target's
    vocab_size: int  # of those matrices; 0 without


def medusa_heads(
    hidden_size: int,
    num_heads: int = 4,
    num_layers: int = 1,
    own_unembedding: bool = False,
    vocab_size: int = 0,
    dtype: Any = jnp.float32,
) -> MedusaHeads:
    """Builds the heads' pure functions.

    Args:
        hidden_size: the target's.
        num_heads: how many tokens below the root are predicted.
        num_layers: residual blocks of each head.
        own_unembedding: gives each head a matrix of its own.
        vocab_size: its rows; needed there only.
        dtype: of activations; parameters are float32, logits anyway.

    Raises:
        ValueError: no head or no layer, an unembedding without rows.
    """
    check_sizes("Medusa", num_heads, num_layers, own_unembedding, vocab_size)
    vocab_size = vocab_size if own_unembedding else 0

    def init(rng_key: Array) -> PyTree:
        def head(rng_key: Array) -> PyTree:
            params: dict[str, Any] = {
                f"blocks_{i}": {
                    "weight": jnp.zeros((hidden_size, hidden_size)),
                    "bias": jnp.zeros(hidden_size),
                }
                for i in range(num_layers)
            }
            if own_unembedding:
                params["lm_head"] = 0.02 * jax.random.normal(rng_key, (vocab_size, hidden_size))
            return params

        return {
            f"heads_{k}": head(key) for k, key in enumerate(jax.random.split(rng_key, num_heads))
        }

    def hidden(params: PyTree, feature: Array, which: Sequence[int] | None = None) -> Array:
        heads = [params[f"heads_{k}"] for k in (range(num_heads) if which is None else which)]
        first = feature.astype(dtype)
        xs = [first] * len(heads)
        for i in range(num_layers):
            blocks = [head[f"blocks_{i}"] for head in heads]
            if i == 0:  # all heads read the same row
                ys = linears(first, tuple(block["weight"] for block in blocks))
            else:
                ys = tuple(linear(x, b["weight"]) for x, b in zip(xs, blocks, strict=True))
            xs = [
                x + activated(y, block["bias"]) for x, y, block in zip(xs, ys, blocks, strict=True)
            ]
        return jnp.stack(xs, -2)

    def unembed(
        params: PyTree,
        target: Model,
        target_params: PyTree,
        hidden: Array,
        which: Sequence[int] | None = None,
    ) -> Array:
        if not own_unembedding:  # K rows cost little more than one
            logits: Array = target.unembed(target_params, hidden)
            return logits
        matrices = [
            params[f"heads_{k}"]["lm_head"] for k in (range(num_heads) if which is None else which)
        ]
        rows = [linear(hidden[..., i, :], w, jnp.float32) for i, w in enumerate(matrices)]
        return jnp.stack(rows, -2)

    return MedusaHeads(
        init, hidden, unembed, hidden_size, num_heads, num_layers, own_unembedding, vocab_size
    )


def activated(y: Array, bias: Array) -> Array:
    """SiLU(y + bias) in float32, in the type of y [..., E]."""
    return jax.nn.silu(y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype)


def check_sizes(
    name: str, num_heads: int, num_layers: int, own_unembedding: bool, vocab_size: int
) -> None:
    """Whether there is something to build.

    Raises:
        ValueError: no head or no layer, an unembedding without rows.
    """
    if num_heads < 1 or num_layers < 1:
        raise ValueError(
            f"{name} heads have num_heads={num_heads} and num_layers={num_layers}; "
            "both must be at least 1."
        )
    if own_unembedding and vocab_size < 1:
        raise ValueError(
            f"{name} heads with an own unembedding have vocab_size={vocab_size}; "
            "it must be the target's."
        )


def check(name: str, heads: Any, target: Model, depth: int) -> None:
    """Whether heads, `MedusaHeads` or `HydraHeads`, fit a target and a tree of some depth.

    Raises:
        ValueError: a tree deeper than there are heads, another hidden size or vocabulary.
    """
    if depth > heads.num_heads:
        raise ValueError(
            f"Tree has depth {depth} but {name} has {heads.num_heads} heads; "
            f"pass a tree of depth at most {heads.num_heads}."
        )
    if heads.hidden_size != target.hidden_size:
        raise ValueError(
            f"The {name} heads have hidden size {heads.hidden_size} but the target "
            f"{target.hidden_size}; they must be the same."
        )
    if heads.own_unembedding and heads.vocab_size != target.vocab_size:
        raise ValueError(
            f"The {name} heads predict {heads.vocab_size} tokens but the target has "
            f"{target.vocab_size}; they must be the same."
        )
