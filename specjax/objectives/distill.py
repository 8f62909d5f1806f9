"""Distillation of a draft model from its target by forward KL.

DistillSpec, arXiv 2310.08461: at every position the draft's law q is pulled towards the target's p,
both at temperature 1. A token drafted from q is accepted with probability sum min(p, q), which is
reported beside the loss.
"""

import jax
import jax.numpy as jnp

from specjax.models.transformer import forward
from specjax.objectives import Objective
from specjax.objectives.next_token import cross_entropy
from specjax.types import Array, Model, PyTree


def distill(model: Model, target: Model) -> Objective:
    """Trains `model` to predict what `target` predicts: KL(p || q), averaged over positions."""

    def loss(
        params: PyTree, target_params: PyTree, batch: Array, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del rng_key
        tokens = batch[:, :-1]
        log_p = jax.nn.log_softmax(
            jax.lax.stop_gradient(forward(target, target_params, tokens).logits)
        )
        logits = forward(model, params, tokens).logits
        log_q = jax.nn.log_softmax(logits)
        kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()
        metrics = {
            "kl": kl,
            "cross_entropy": cross_entropy(logits, batch[:, 1:]).mean(),
            "teacher_forced_acceptance": jnp.exp(jnp.minimum(log_p, log_q)).sum(-1).mean(),
        }
        return kl, metrics

    return Objective(lambda rng_key, target_params: model.init(rng_key), loss)
