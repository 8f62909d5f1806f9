"""What the target says about every position of a batch, and how far a drafter is from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from specjax.kernels.vocabulary import argmax
from specjax.models.transformer import forward
from specjax.objectives import Batch
from specjax.types import Array, Model, PyTree


class Teaching(NamedTuple):
    """A target's forward pass, no gradient flowing back."""

    log_p: Array  # [B, T, V] float32, of the token after each position
    features: Array  # [B, T, F]


def teach(target: Model, target_params: PyTree, batch: Batch, temperature: float = 1.0) -> Teaching:
    """Runs the target over `batch.tokens[:, :-1]`; its laws are those at `temperature`."""
    output = jax.lax.stop_gradient(forward(target, target_params, batch.tokens[:, :-1]))
    return Teaching(jax.nn.log_softmax(output.logits / temperature), output.features)


def mean(values: Array, weights: Array) -> Array:
    """The weighted mean of values [...]; 0 where all weights are."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1e-6)


def report(log_p: Array, log_q: Array, weights: Array, index: int) -> dict[str, Array]:
    """How often the drafted token `index` (from 1) would be kept, all before it being kept.

    Args:
        log_p, log_q: [..., V] log-laws of the same token.
        weights: [...].
        index: of the drafted token in its draft.

    Returns:
        `acceptance_<index>`: the mean of sum min(p, q), for sampled drafts at temperature 1;
        `agreement_<index>`: how often both prefer the same token, for temperature 0.
    """
    log_p, log_q = jax.lax.stop_gradient((log_p, log_q))
    accepted = jnp.exp(jnp.minimum(log_p, log_q)).sum(-1)
    agrees = argmax(log_p) == argmax(log_q)
    return {
        f"acceptance_{index}": mean(accepted, weights),
        f"agreement_{index}": mean(agrees.astype(jnp.float32), weights),
    }
