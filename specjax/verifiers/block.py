"""Block verification: a chain is judged as a whole, which accepts more than token by token.

Sun et al. (arXiv 2403.10444). Prefix i of the chain has weight w_i = min(1, w_{i-1} p(x_i) /
q(x_i)), the share of its probability that the target will pay for. It is offered h_i = S_i /
(S_i + 1 - w_i), where S_i = sum relu(w_i p - q) over the tokens that might follow it; the longest
prefix whose own draw succeeds is kept, and the next token comes from norm(relu(w_i p - q)). The
whole chain is offered its weight and followed by a token of p's.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels.vocabulary import softmax
from specjax.sampling import bernoulli, categorical
from specjax.types import Array, Context, Draft, Keys, ModelOutput, Params, Verdict, Verifier
from specjax.verifiers.rejection import points, rows_at

_TINY = 1e-37  # of log q; smaller floats may be flushed to zero


def block() -> Verifier:
    """The best rule for a single path, lossless for chains."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        del params, output
        if draft.probs is None:  # then prefixes are accepted as often as their tokens one by one
            return points(rng_keys, context, draft, warped, "block.next")
        path, num_nodes, residual = _judge(rng_keys, context, draft, draft.probs, warped)
        next_token = categorical(rng_keys, context, "block.next", jnp.log(residual))
        return Verdict(path, num_nodes, next_token)

    return Verifier(verify, ("chain",))


def _judge(
    rng_keys: Keys, context: Context, draft: Draft, q: Array, warped: Array
) -> tuple[Array, Array, Array]:
    """The closed form: w = exp(s - max(0, cummax s)) where s = cumsum log(p(x) / q(x))."""
    n = warped.shape[1]
    tokens = draft.tokens[:, 1:, None]  # [B, D, 1]
    p = softmax(warped)
    log_p = jnp.log(jnp.take_along_axis(p[:, :-1], tokens, 2))
    log_q = jnp.log(jnp.maximum(jnp.take_along_axis(q[:, 1:], tokens, 2), _TINY))
    s = lax.cumsum(log_p - log_q, 1)
    w = jnp.exp(s - jax.nn.relu(lax.cummax(s, 1)))  # [B, D, 1], of prefixes 1 .. D
    excess = jax.nn.relu(w[:, :-1] * p[:, 1:-1] - q[:, 2:]).sum(-1)  # of prefixes 1 .. D - 1
    w = w[..., 0]
    h = jnp.concatenate([offered(excess, w[:, :-1]), w[:, -1:]], 1)
    success = bernoulli(rng_keys, context, "block.accept", h)

    prefix = jnp.arange(n, dtype=jnp.int32)
    tau = jnp.where(success, prefix[1:], 0).max(-1, initial=0)
    w = jnp.pad(w, ((0, 0), (1, 0)), constant_values=1)  # the root's is 1
    w_tau = jnp.take_along_axis(w, tau[:, None], 1)
    p_tau = rows_at(p, tau)
    q_tau = rows_at(q, jnp.minimum(tau + 1, n - 1))
    q_tau = jnp.where((tau == n - 1)[:, None], 0.0, q_tau)
    residual = jax.nn.relu(w_tau * p_tau - q_tau)
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_tau)
    return jnp.where(prefix <= tau[:, None], prefix, 0), tau + 1, residual


def offered(excess: Array, weight: Array) -> Array:
    """h = S / (S + 1 - w), 1 where that is 0 / 0."""
    total = excess + (1 - weight)
    return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1.0), 1.0)
