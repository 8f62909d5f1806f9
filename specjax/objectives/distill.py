"""Distillation of an independent draft model from its target.

At every position the draft's law q is pulled towards the target's law p, by a divergence of choice.
DistillSpec (arXiv 2310.08461) found that the best one depends on task and temperature, and that the
text matters as much: it should be the target's or the draft's own, which is the batch's affair.
Online distillation (arXiv 2310.07177) does the same on text met while serving. Forward KL, best
there, is the default here, at temperature 1; `losses` has the others, LK losses and D-PACE.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from specjax.build import build
from specjax.drafters.model import model as model_drafter
from specjax.models.transformer import forward
from specjax.objectives import Batch, Objective, losses, options
from specjax.objectives.losses import PositionWeights
from specjax.objectives.next_token import cross_entropy, trainee
from specjax.objectives.teacher import mean, report, teach
from specjax.types import Array, Model, PyTree

_OPTIONS: dict[str, Any] = {
    "model": {},  # TransformerConfig's fields
    "loss": {"call": "specjax.objectives.losses.forward_kl"},
    "temperature": 1.0,  # of both laws
    "draft_length": 4,  # tokens that stand for one draft
    "position_weights": {"call": "specjax.objectives.losses.uniform"},  # of a draft's tokens
    "build": {
        "call": "specjax.drafters.grow.chain",
        "num_tokens": 4,
        "choose": {"call": "specjax.drafters.grow.without_replacement"},
    },
    "initial": "",  # a directory to start from
    "remat": False,  # computes layers again in the backward pass instead of keeping them
    "dtype": jnp.float32,  # of activations
}


def distill(config: Mapping[str, Any], target: Model | None) -> Objective:
    """Trains a draft model to predict what the target predicts.

    A batch with a cached teacher needs no target pass: losses then compare laws over the teacher's
    tokens and all others together (`losses.coarse_pair`), and the reported acceptance is a lower
    bound, what is left out being counted as refused.

    Args:
        config: see `_OPTIONS`; losses, weights and tree as `specjax.build.build` takes them.
        target: gives the law and the vocabulary.

    Raises:
        ValueError: no target, another vocabulary than its, an option that does not exist or is out
            of range; as `trainee`. When `loss` is traced: a cached teacher at another temperature
            than 1.
    """
    if target is None:
        raise ValueError("Objective distill has no target; set config.target to a directory.")
    c = options("distill", config, **_OPTIONS)
    if c.temperature <= 0:
        raise ValueError(f"temperature of distill is {c.temperature}; need more than 0.")
    if c.draft_length < 1:
        raise ValueError(f"draft_length of distill is {c.draft_length}; need at least 1.")
    model, init, export = trainee("distill", c)
    if model.vocab_size != target.vocab_size:
        raise ValueError(
            f"The model of distill has a vocabulary of {model.vocab_size} but the target one of "
            f"{target.vocab_size}; a draft needs its target's."
        )
    divergence, position_weights = build(c.loss), build(c.position_weights)

    def loss(
        params: PyTree, target_params: PyTree, batch: Batch, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        labels = batch.tokens[:, 1:]
        logits = forward(model, params, batch.tokens[:, :-1]).logits
        log_q = jax.nn.log_softmax(logits / c.temperature)
        metrics = {"cross_entropy": mean(cross_entropy(logits, labels), batch.weights)}
        tokens, probs = batch.teacher_tokens, batch.teacher_probs
        if tokens is None or probs is None:
            log_p = teach(target, target_params, batch, c.temperature).log_p
            nats = divergence(log_p, log_q, labels)
            metrics["kl"] = mean(losses.forward_kl()(log_p, log_q, labels), batch.weights)
        elif c.temperature == 1:
            nats = divergence(*losses.coarse_pair(tokens, probs, log_q, labels))
            log_p = losses.cached_law(tokens, probs, model.vocab_size)
        else:
            raise ValueError(
                f"temperature of distill is {c.temperature} but a cached teacher's is 1; leave "
                "the teacher out of the data or set the temperature to 1."
            )
        metrics |= report(log_p, log_q, batch.weights, 1)
        log_q_labels = jnp.take_along_axis(log_q, labels[..., None], -1)[..., 0]
        share = _weigh(position_weights, log_q_labels, batch.weights > 0, c.draft_length, rng_key)
        return mean(nats, batch.weights * share), jax.lax.stop_gradient(metrics)

    drafter = model_drafter(model, build(c.build))
    return Objective(init, loss, export, drafter, student=model)


def _weigh(
    position_weights: PositionWeights,
    log_q_labels: Array,
    counts: Array,
    draft_length: int,
    rng_key: Array,
) -> Array:
    """The weight [B, T] of every position, drafts following each other from a random place on.

    Args:
        position_weights: of the tokens of one draft.
        log_q_labels: [B, T].
        counts: [B, T] bool, which tokens are to be predicted; none beyond the sequence's ends is.
        draft_length: tokens in a draft.
        rng_key: draws the place.
    """
    b, t = log_q_labels.shape
    before = jax.random.randint(rng_key, (), 0, draft_length)
    num_drafts = -(-(t + draft_length - 1) // draft_length)

    def cut(x: Array) -> Array:
        nothing = jnp.zeros((b, num_drafts * draft_length), x.dtype)
        padded = jax.lax.dynamic_update_slice(nothing, x, (0, before))
        return padded.reshape(b, num_drafts, draft_length)

    weights = position_weights(cut(log_q_labels), cut(counts)).reshape(b, -1)
    return jax.lax.dynamic_slice(weights, (0, before), (b, t))
