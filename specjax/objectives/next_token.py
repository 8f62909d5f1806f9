"""Plain language modelling: cross-entropy of the next token."""

import jax
import jax.numpy as jnp

from specjax.models.transformer import forward
from specjax.objectives import Objective
from specjax.types import Array, Model, PyTree


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Nats [...] of labels [...] under logits [..., V], in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked


def next_token(model: Model) -> Objective:
    """Trains `model` on text; no target is involved."""

    def loss(
        params: PyTree, target_params: PyTree, batch: Array, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del target_params, rng_key
        logits = forward(model, params, batch[:, :-1]).logits
        nats = cross_entropy(logits, batch[:, 1:]).mean()
        return nats, {"cross_entropy": nats}

    return Objective(lambda rng_key, target_params: model.init(rng_key), loss)
