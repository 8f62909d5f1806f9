"""EAGLE's heads, trained at the very passes they make when they draft.

Step 0 of a draft reads the target's features; step s reads what the head itself put out at step
s - 1, and attends to its own keys of the last s tokens and to step 0's of all before. `unroll` runs
these steps over whole sequences with the block of keys and values that drafting hands on as well:
EAGLE-3's training-time test (arXiv 2503.01840) and HASS's harmonised context (arXiv 2408.15766).
EAGLE-1 (arXiv 2401.15077) is its step 0.

All three learn from the target's law (soft cross-entropy). Where ours differ from the papers': the
head shares the target's embedding and, unless told otherwise, its unembedding; the step sizes and
lengths of training are the config's.
"""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax.build import build
from specjax.drafters import grow
from specjax.drafters.eagle import eagle as eagle_drafter
from specjax.models import hf_heads
from specjax.models.eagle import EagleHead, check, eagle3_head, eagle_head
from specjax.models.transformer import TransformerConfig
from specjax.objectives import Batch, Objective, losses
from specjax.objectives.heads import head_options, initial, unembedding
from specjax.objectives.teacher import mean, report, teach
from specjax.types import Array, Model, PyTree

_OPTIONS: dict[str, Any] = {
    "head": {},  # TransformerConfig's fields of its layer; the caller adds vocab_size
    "num_steps": 1,  # of the unrolled draft
    "loss": losses.forward_kl(),  # of the laws
    "loss_weight": 1.0,
    "feature_weight": 0.0,  # of SmoothL1 between the head's output and the next feature
    "position_weights": losses.uniform(),  # of the steps
    "noise": 0.0,  # width of the uniform noise on the target's features
    "temperature": 1.0,  # of both laws
    "build": grow.chain(4, grow.without_replacement()),
    "remat": False,  # computes logits again in the backward pass instead of keeping them
    "initial": "",  # a directory to start from
    "dtype": jnp.float32,  # of activations
}


def eagle(config: Mapping[str, Any], target: Model) -> Objective:
    """EAGLE-1: SmoothL1 of the feature and a tenth of the law's cross-entropy, one step.

    The paper's noise on features is uniform in +-0.1 at 512 tokens: `noise` is 0.2.
    """
    defaults = {"feature_weight": 1.0, "loss_weight": 0.1, "noise": 0.2}
    c = head_options("eagle", config, target, {**_OPTIONS, **defaults, "bias": True})
    return _eagle("eagle", c, eagle_head(_layer("eagle", c, target), c.bias, c.dtype), target)


def hass(config: Mapping[str, Any], target: Model) -> Objective:
    """HASS: EAGLE-1's losses and that of the target's ten likeliest tokens, over three steps."""
    law = losses.weighted([(losses.forward_kl(), 0.1), (losses.top_k_ce(10), 1.0)])
    defaults = {"feature_weight": 1.0, "loss": law, "num_steps": 3, "bias": True}
    c = head_options("hass", config, target, {**_OPTIONS, **defaults})
    return _eagle("hass", c, eagle_head(_layer("hass", c, target), c.bias, c.dtype), target)


def eagle3(config: Mapping[str, Any], target: Model) -> Objective:
    """EAGLE-3: fused features, no loss on them, the training-time test over several steps.

    The head reads the target's `feature_layers`. `vocabulary`, ascending target ids, restricts what
    it drafts: the target's law is renormalised to them, and places where the target prefers another
    id do not count. The official code unrolls 7 steps; the default here is 5. Steps weigh 0.8^k as
    there.
    """
    defaults = {"num_steps": 5, "position_weights": losses.geometric(0.8)}
    more = {"vocabulary": None, "own_unembedding": False}
    c = head_options("eagle3", config, target, {**_OPTIONS, **defaults, **more})
    vocabulary = None if c.vocabulary is None else np.asarray(c.vocabulary)
    layer = _layer("eagle3", c, target)
    head = eagle3_head(layer, target.feature_layers, vocabulary, c.own_unembedding, c.dtype)
    return _eagle("eagle3", c, head, target)


def _layer(name: str, c: SimpleNamespace, target: Model) -> TransformerConfig:
    shape = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size, **c.head}
    try:
        return TransformerConfig(**{"num_layers": 1, **shape})
    except TypeError as error:
        raise ValueError(f"The head of {name} has {sorted(c.head)}: {error}.") from error


class Step(NamedTuple):
    """One step of the unrolled draft, at every place of a sequence."""

    hidden: Array  # [B, N, E], what the head put out
    valid: np.ndarray  # [N] bool: places that have enough tokens before them to have come this far


def unroll(
    head: EagleHead, params: PyTree, hidden: Array, embeddings: Array, num_steps: int
) -> Iterator[Step]:
    """Drafts `num_steps` deep from every place at once, the true tokens being fed.

    Args:
        head: the head.
        params: its weights.
        hidden: [B, N, E], `head.fuse` of the features at positions 0 .. N - 1.
        embeddings: [B, N, E], of the tokens after them.
        num_steps: at step s place i reads the output of step s - 1 at place i - 1, and predicts the
            token two places on, as at step 0.
    """
    b, n = hidden.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    at = np.arange(n)
    cache, block = head.init_cache(b, 0), None
    for s in range(num_steps):
        # Of step 0 a place sees all but the last s tokens, of step r the one s - r places back.
        seen = [at[None, :] <= at[:, None] - s]
        seen += [at[None, :] == at[:, None] - (s - r) for r in range(1, s + 1)]
        mask = jnp.broadcast_to(jnp.asarray(np.concatenate(seen, 1)), (b, n, n * (s + 1)))
        hidden, block = head.apply(params, hidden, embeddings, positions, mask, cache, block)
        yield Step(hidden, at >= s)
        hidden = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :n]


def smooth_l1(x: Array, y: Array) -> Array:
    """Huber's loss at 1 in the mean over the last axis, [..., E] -> [...] float32."""
    d = jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))
    return jnp.where(d < 1, 0.5 * d * d, d - 0.5).mean(-1)


def _eagle(name: str, c: SimpleNamespace, head: EagleHead, target: Model) -> Objective:
    check(head, target)
    if c.num_steps < 1:
        raise ValueError(f"num_steps of {name} is {c.num_steps}; need at least 1.")
    if c.feature_weight and head.feature_layers:
        raise ValueError(
            f"feature_weight of {name} is {c.feature_weight}, but an EAGLE-3 head's output is no "
            "feature of the target; need 0."
        )
    law_loss = build(c.loss)
    position_weights = build(c.position_weights)
    drafter = eagle_drafter(target, head, build(c.build))

    def init(rng_key: Array, target_params: PyTree) -> PyTree:
        params = initial(name, c.initial, head, target, rng_key)
        if head.own_unembedding and not c.initial:
            ids = slice(None) if head.vocabulary is None else head.vocabulary
            params = {**params, "lm_head": unembedding(target, target_params)[ids]}
        return params

    def loss(
        params: PyTree, target_params: PyTree, batch: Batch, rng_key: Array
    ) -> tuple[Array, dict[str, Array]]:
        teacher = teach(target, target_params, batch, c.temperature)
        # Place i is the pair of feature i and token i + 1; it predicts feature i + 1, token i + 2.
        features = teacher.features[:, :-1]
        if c.noise:
            width = c.noise * 512 / batch.tokens.shape[1]
            noise = jax.random.uniform(rng_key, features.shape, jnp.float32, -0.5, 0.5)
            features = features + (width * noise).astype(features.dtype)
        embeddings = jax.lax.stop_gradient(target.embed(target_params, batch.tokens[:, 1:-1]))
        log_p, labels, weights = teacher.log_p[:, 1:], batch.tokens[:, 2:], batch.weights[:, 1:]
        next_feature = teacher.features[:, 1:, : target.hidden_size]
        log_p_draft, labels_draft = log_p, labels
        if head.vocabulary is not None:
            log_p_draft = jax.nn.log_softmax(log_p[..., head.vocabulary])
            column = np.full(target.vocab_size, 0)
            column[head.vocabulary] = np.arange(len(head.vocabulary))
            labels_draft = jnp.asarray(column)[labels]
            kept = np.zeros(target.vocab_size, bool)
            kept[head.vocabulary] = True
            weights = weights * jnp.asarray(kept)[jnp.argmax(log_p, -1)]

        def judge(params: PyTree, hidden: Array, weights: Array) -> tuple[Array, Array, Array]:
            """The losses [B, N] of one step, and log q of the labels."""
            logits = head.logits(params, target, target_params, hidden) / c.temperature
            log_q = jax.nn.log_softmax(logits)
            label = jnp.take_along_axis(log_q, labels_draft[..., None], -1)[..., 0]
            return law_loss(log_p_draft, log_q, labels_draft), label, log_q

        if c.remat:
            judge = jax.checkpoint(judge)
        fused = head.fuse(params, target, features)
        laws, features_apart, label_laws, valid = [], [], [], []
        metrics: dict[str, Array] = {}
        for s, step in enumerate(unroll(head, params, fused, embeddings, c.num_steps)):
            law, label, log_q = judge(params, step.hidden, weights)
            laws.append(law)
            label_laws.append(label)
            valid.append(weights * step.valid)
            features_apart.append(smooth_l1(step.hidden, next_feature))
            if head.vocabulary is not None:
                everywhere = jnp.full(log_p.shape, -jnp.inf)
                log_q = everywhere.at[..., head.vocabulary].set(log_q)
            metrics |= report(log_p, log_q, batch.weights[:, 1:] * step.valid, s + 1)
        counts = jnp.stack(valid, -1)
        share = position_weights(jnp.stack(label_laws, -1), counts > 0)  # [B, N, K]

        def over_steps(found: list[Array]) -> Array:
            """The sum over steps of each one's weighted mean."""
            means = [mean(share[..., s] * x, counts[..., s]) for s, x in enumerate(found)]
            return jnp.stack(means).sum()

        metrics["law_loss"] = over_steps(laws)
        total = c.loss_weight * metrics["law_loss"]
        if c.feature_weight:
            metrics["feature_loss"] = over_steps(features_apart)
            total += c.feature_weight * metrics["feature_loss"]
        return total, metrics

    def export(
        directory: str, trainable: PyTree, eos_ids: tuple[int, ...] = (), bos_id: int | None = None
    ) -> None:
        del eos_ids, bos_id
        hf_heads.save(directory, head, trainable)

    return Objective(init, loss, export, drafter)
