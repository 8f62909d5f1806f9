"""How far a draft's law q is from the target's law p, per position, and how positions weigh.

A loss takes `log_p` [..., V], `log_q` [..., V] and `labels` [...] and returns nats [...] float32;
gradients are meant for q. A token drafted from q is kept with probability sum min(p, q), which is 1
minus the total variation. The divergences of DistillSpec (arXiv 2310.08461) and online distillation
(arXiv 2310.07177) bound that, by Pinsker's inequality, and see the tails, too.

Either law may rule tokens out (-inf): 0 log 0 is 0. Where a loss would take the logarithm of
another zero, it takes that of e^-100; so it does for all that p gives less. No gradient flows
through what q rules out.

The weight of a drafted token in its draft is a function of `log_q` [..., K] of the draft's K labels
and of which of them count, [..., K] (by default all). It returns [..., K] float32 without gradient.
Weights are the papers' own, not normalised: whoever averages divides by their sum, which leaves
D-PACE its difference between hopeful and hopeless drafts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from specjax.build import build
from specjax.types import Array

Loss = Callable[[Array, Array, Array], Array]  # (log_p, log_q, labels) -> nats
PositionWeights = Callable[..., Array]  # (log_q_labels, counts=None) -> weights

_FLOOR = -100.0  # e^-100 is 0 in float32


def _finite(log_p: Array, log_q: Array) -> tuple[Array, Array]:
    log_p, log_q = log_p.astype(jnp.float32), log_q.astype(jnp.float32)
    # What q merely finds unlikely keeps its value, and with it its gradient.
    return jnp.maximum(log_p, _FLOOR), jnp.where(log_q == -jnp.inf, _FLOOR, log_q)


def _kl(log_p: Array, log_q: Array) -> Array:
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _overlap(log_p: Array, log_q: Array) -> Array:
    return jnp.exp(jnp.minimum(log_p, log_q)).sum(-1)


# ----------------------------------------------------------------------------- losses


def hard_ce() -> Loss:
    """-log q(y): p is not used, the labels y should be the target's own text."""

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        _, log_q = _finite(log_p, log_q)
        return -jnp.take_along_axis(log_q, labels[..., None], -1)[..., 0]

    return loss


def forward_kl() -> Loss:
    """KL(p || q): the gradient is that of the soft cross-entropy -sum p log q."""

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        return _kl(*_finite(log_p, log_q))

    return loss


def reverse_kl() -> Loss:
    """KL(q || p), meant for text that the draft itself has written."""

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        log_p, log_q = _finite(log_p, log_q)
        return _kl(log_q, log_p)

    return loss


def jsd(beta: float = 0.5) -> Loss:
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m).

    Where m = beta p + (1 - beta) q.

    Raises:
        ValueError: beta not strictly between 0 and 1, where it is 0 for all laws.
    """
    if not 0 < beta < 1:
        raise ValueError(f"jsd has beta {beta}; need more than 0 and less than 1.")

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        log_p, log_q = _finite(log_p, log_q)
        log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    return loss


def total_variation() -> Loss:
    """1/2 sum |p - q|, how often a token drafted from q is refused.

    DSpark (arXiv 2607.05147) minimises 0.1 of `hard_ce` and 0.9 of sum |p - q|: 1.8 of this.
    """

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        log_p, log_q = _finite(log_p, log_q)
        return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)

    return loss


def lk_alpha() -> Loss:
    """-log sum min(p, q) of LK losses (arXiv 2602.23881), here at every position by itself."""

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        return -jax.nn.logsumexp(jnp.minimum(*_finite(log_p, log_q)), -1)

    return loss


def lk_lambda(decay: float = 1.0, scale: float = 1.0) -> Loss:
    """w KL(p || q) + (1 - w) (1 - sum min(p, q)), w = scale exp(-decay sum min(p, q)).

    LK losses, arXiv 2602.23881: KL leads until the laws overlap; w has no gradient. Here w is each
    position's own; some implementations take one from the batch's mean overlap, or decay 3.

    Raises:
        ValueError: a decay below 0, a scale that is not from 0 to 1.
    """
    if decay < 0 or not 0 <= scale <= 1:
        raise ValueError(
            f"lk_lambda has decay {decay} and scale {scale}; need decay at least 0 and scale "
            "from 0 to 1."
        )

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        log_p, log_q = _finite(log_p, log_q)
        overlap = _overlap(log_p, log_q)
        w = scale * jnp.exp(-decay * jax.lax.stop_gradient(overlap))
        return w * _kl(log_p, log_q) + (1 - w) * (1 - overlap)

    return loss


def top_k_ce(k: int = 10) -> Loss:
    """-sum p log q over the k likeliest tokens of p (HASS, arXiv 2408.15766), p as it is.

    Raises:
        ValueError: k below 1.
    """
    _check_k("top_k_ce", k)

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        del labels
        log_p, log_q = _finite(log_p, log_q)
        best, tokens = jax.lax.top_k(log_p, min(k, log_p.shape[-1]))
        return -(jnp.exp(best) * jnp.take_along_axis(log_q, tokens, -1)).sum(-1)

    return loss


def weighted(terms: Sequence[tuple[Any, float]]) -> Loss:
    """A sum of losses.

    Args:
        terms: pairs of a loss, or what `build` builds one from, and its weight.

    Raises:
        ValueError: no terms, a negative weight.
    """
    losses = [(build(loss), weight) for loss, weight in terms]
    if not losses or min(weight for _, weight in losses) < 0:
        weights = [weight for _, weight in losses]
        raise ValueError(f"weighted has weights {weights}; need some, none of them negative.")

    def loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        first, *others = [weight * loss(log_p, log_q, labels) for loss, weight in losses]
        return sum(others, first)

    return loss


# ----------------------------------------------------------------------------- the likeliest tokens


def top_k(loss: Loss, k: int) -> Loss:
    """A loss of coarser laws: the k likeliest tokens of p, and all others as one more outcome.

    Divergences of coarser laws are lower bounds of those of the laws themselves. The result is what
    a teacher cached with k tokens gives.

    Raises:
        ValueError: k below 1.
    """
    _check_k("top_k", k)

    def coarse_loss(log_p: Array, log_q: Array, labels: Array) -> Array:
        probs = jnp.exp(log_p.astype(jnp.float32))
        best, tokens = jax.lax.top_k(probs, min(k, probs.shape[-1]))
        return loss(*coarse_pair(tokens, best, log_q, labels))

    return coarse_loss


def coarse_pair(
    teacher_tokens: Array, teacher_probs: Array, log_q: Array, labels: Array
) -> tuple[Array, Array, Array]:
    """Both laws over the teacher's k tokens and, as outcome k, all others together.

    Args:
        teacher_tokens: [..., k], distinct.
        teacher_probs: [..., k], what the teacher gives them.
        log_q: [..., V].
        labels: [...].

    Returns:
        log_p [..., k + 1], log_q [..., k + 1], and labels [...] as outcomes. Outcome k of p may be
        -inf; that of q is never, and has no gradient where nothing is left.
    """
    probs = teacher_probs.astype(jnp.float32)
    others = jnp.maximum(1 - probs.sum(-1, keepdims=True), 0)
    log_p = jnp.log(jnp.concatenate([probs, others], -1))

    log_q = log_q.astype(jnp.float32)
    # A sum of what is left; 1 minus the rest would lose small masses and their gradients.
    left = jnp.put_along_axis(jnp.exp(log_q), teacher_tokens, 0.0, -1, inplace=False)
    mass = jnp.maximum(left.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    log_q = jnp.concatenate([jnp.take_along_axis(log_q, teacher_tokens, -1), jnp.log(mass)], -1)

    is_label = teacher_tokens == labels[..., None]
    place = jnp.argmax(is_label, -1)
    return log_p, log_q, jnp.where(is_label.any(-1), place, probs.shape[-1]).astype(jnp.int32)


def cached_law(teacher_tokens: Array, teacher_probs: Array, vocab_size: int) -> Array:
    """log p [..., V] of the teacher's k tokens [..., k], -inf elsewhere: not a whole law."""
    nothing = jnp.full((*teacher_tokens.shape[:-1], vocab_size), -jnp.inf)
    log_p = jnp.log(teacher_probs.astype(jnp.float32))
    return jnp.put_along_axis(nothing, teacher_tokens, log_p, -1, inplace=False)


def _check_k(name: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{name} has k {k}; need at least 1.")


# ----------------------------------------------------------------------------- weights of positions


def uniform() -> PositionWeights:
    """1 for every token of a draft."""
    return _of_place(lambda place: jnp.ones_like(place))


def geometric(decay: float = 0.8) -> PositionWeights:
    """decay^k for the tokens k = 0, 1, .. of a draft: Medusa's (arXiv 2401.10774) and EAGLE-3's.

    Raises:
        ValueError: a decay that is not positive.
    """
    if decay <= 0:
        raise ValueError(f"geometric has decay {decay}; need more than 0.")
    return _of_place(lambda place: decay**place)


def exponential(gamma: float = 4.0) -> PositionWeights:
    """exp(-k / gamma) for the tokens k = 0, 1, .. of a draft: DSpark's (arXiv 2607.05147).

    Raises:
        ValueError: a gamma that is not positive.
    """
    if gamma <= 0:
        raise ValueError(f"exponential has gamma {gamma}; need more than 0.")
    return _of_place(lambda place: jnp.exp(-place / gamma))


def _of_place(weigh: Callable[[Array], Array]) -> PositionWeights:
    def weights(log_q_labels: Array, counts: Array | None = None) -> Array:
        del counts
        place = jnp.arange(log_q_labels.shape[-1], dtype=jnp.float32)
        return jnp.broadcast_to(weigh(place), log_q_labels.shape)

    return weights


def dpace(a: float = 0.5) -> PositionWeights:
    """sum_{j >= k} prod_{i <= j} s_i where s_i = (1 - a) q_i(y_i) + a: D-PACE, arXiv 2605.18810.

    This is the derivative by log s_k of the expected number of accepted tokens, were each accepted
    with probability s. Tokens that do not count neither end a draft nor lengthen it. The official
    code sums over a row's tokens; an average divides by the weights' sum as well.

    Raises:
        ValueError: a that is not from 0 to 1.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"dpace has a {a}; need a number from 0 to 1.")

    def weights(log_q_labels: Array, counts: Array | None = None) -> Array:
        q = jnp.exp(jax.lax.stop_gradient(log_q_labels).astype(jnp.float32))
        counts = jnp.ones(q.shape, bool) if counts is None else counts
        prefix = jnp.cumprod(jnp.where(counts, (1 - a) * q + a, 1.0), -1)
        reached = jnp.where(counts, prefix, 0.0)
        return jnp.cumsum(reached[..., ::-1], -1)[..., ::-1]

    return weights
