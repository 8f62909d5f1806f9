"""K-SEQ: independent siblings, each accepted with probability min(1, p / (rho q)).

The rule of SpecTr (Sun et al., arXiv 2310.15141) for K tokens X ~ q. With m = min(p / rho, q) and
beta = sum m, a child in K is accepted with p_acc = 1 - (1 - beta)^K, the accepted token being y
with probability m(y) p_acc / beta; the residual p - m p_acc / beta supplies the rest. Since m is at
most p / rho, that residual is a law's for every rho with p_acc <= rho beta: any of these is exact.
The least of them, rho*, accepts most. One child has rho = 1, which is speculative sampling.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import Array, Verifier
from specjax.verifiers.descent import descent

_LOSS = 1e-4  # of acceptance at a node, against rho*
_MOST_STEPS = 30


def kseq() -> Verifier:
    """SpecTr's sequential selection, lossless for chains and for independent siblings."""
    return Verifier(descent("kseq", _rule), ("chain", "paths", "siblings"))


def _rule(p: Array, q: Array, ratio: Array, is_child: Array) -> tuple[Array, Array]:
    k = is_child.sum(-1, keepdims=True).astype(p.dtype)
    rho, beta = _least_rho(p, q, k)
    # p_acc / beta, which tends to K as beta vanishes.
    scale = jnp.where(beta > 0, _accepted(beta, k) / jnp.where(beta > 0, beta, 1.0), k)
    return ratio / rho, jax.nn.relu(p - scale * jnp.minimum(p / rho, q))


def _accepted(beta: Array, k: Array) -> Array:
    """p_acc = 1 - (1 - beta)^K."""
    return -jnp.expm1(k * jnp.log1p(-jnp.minimum(beta, 1.0)))


def _least_rho(p: Array, q: Array, k: Array) -> tuple[Array, Array]:
    """An exact rho close to rho*, and its beta; all [B, 1].

    Newton's method on the slack rho beta - p_acc, which grows with rho, within a bracket whose
    upper end is always exact: K is. rho beta = sum min(p, rho q) grows, too, and equals p_acc at
    rho*, so what rho accepts less than rho* is at most its slack.
    """

    def step(carry: tuple) -> tuple:
        i, rho, low, high, beta, slack = carry
        few = p < rho * q
        p_few = jnp.where(few, p, 0.0).sum(-1, keepdims=True) / rho
        q_rest = jnp.where(few, 0.0, q).sum(-1, keepdims=True)
        b = p_few + q_rest
        s = rho * b - _accepted(b, k)
        slope = q_rest + k * jnp.maximum(1 - b, 0.0) ** (k - 1) * p_few / rho
        exact = (s >= 0) | (i == 0)
        low, high = jnp.where(exact, low, rho), jnp.where(exact, rho, high)
        beta, slack = jnp.where(exact, b, beta), jnp.where(exact, s, slack)
        newton = rho - (s - _LOSS / 2) / slope
        inside = (low < newton) & (newton < high)
        rho = jnp.where(inside, newton, (low + high) / 2)
        # A row that is done stays as it is, whatever its company needs.
        return i + 1, jnp.where(slack <= _LOSS, high, rho), low, high, beta, slack

    most = jnp.maximum(k, 1.0)
    start = (
        jnp.int32(0),
        most,
        jnp.ones_like(k),
        most,
        jnp.ones_like(k),
        jnp.full_like(k, jnp.inf),
    )
    _, _, _, rho, beta, _ = lax.while_loop(
        lambda carry: (carry[0] < _MOST_STEPS) & (carry[-1] > _LOSS).any(), step, start
    )
    return rho, beta
