"""Speculative sampling: accept a token with probability min(1, p / q), else draw from the residual.

Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) on a chain; on a tree the
siblings are tried in storage order against a shrinking residual, which covers SpecInfer (arXiv
2305.09781, i.i.d. siblings), RSD and Sequoia (arXiv 2402.14160, 2402.12374, without replacement)
and deterministic siblings alike, because `Draft.probs` holds each node's law given its elders.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specjax import trees
from specjax.sampling import bernoulli, categorical, softmax
from specjax.types import LAWS, Array, Context, Draft, Keys, ModelOutput, Params, Verdict, Verifier

_TINY = 1e-37  # a ratio's denominator; smaller floats may be flushed to zero


def rejection() -> Verifier:
    """Top-down rejection sampling, lossless for every law."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        del params, output
        rule = _chain if draft.tokens.shape[1] == draft.depth + 1 else _tree
        path, num_nodes, residual = rule(rng_keys, context, draft, softmax(warped))
        next_token = categorical(rng_keys, context, "rejection.next", jnp.log(residual))
        return Verdict(path, num_nodes, next_token)

    return Verifier(verify, LAWS)


def _chain(rng_keys: Keys, context: Context, draft: Draft, p: Array) -> tuple[Array, Array, Array]:
    """The closed form: m accepted tokens, residual norm(relu(p_m - q_{m+1})), q past the end 0."""
    _, n, vocab = p.shape
    tokens = draft.tokens[:, 1:, None]  # [B, D, 1]
    p_token = jnp.take_along_axis(p[:, :-1], tokens, 2)[..., 0]
    if draft.probs is None:
        q_token = jnp.ones_like(p_token)
    else:
        q_token = jnp.take_along_axis(draft.probs[:, 1:], tokens, 2)[..., 0]
    ratio = p_token / jnp.maximum(q_token, _TINY)
    accepted = bernoulli(rng_keys, context, "rejection.accept", ratio)
    m = jnp.cumprod(accepted, 1).sum(1, dtype=jnp.int32)
    p_m = jnp.take_along_axis(p, m[:, None, None], 1)[:, 0]
    tried = jnp.minimum(m + 1, n - 1)[:, None]  # the node that failed, if any did
    if draft.probs is None:
        q_m = jax.nn.one_hot(jnp.take_along_axis(draft.tokens, tried, 1)[:, 0], vocab)
    else:
        q_m = jnp.take_along_axis(draft.probs, tried[..., None], 1)[:, 0]
    q_m = jnp.where((m == n - 1)[:, None], 0.0, q_m)
    residual = jax.nn.relu(p_m - q_m)
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_m)
    path = jnp.arange(n, dtype=jnp.int32)
    return jnp.where(path <= m[:, None], path, 0), m + 1, residual


def _tree(rng_keys: Keys, context: Context, draft: Draft, p: Array) -> tuple[Array, Array, Array]:
    """All parents at once, one round per place among siblings, on unnormalised residuals.

    With R = p at first and Z = sum R: the k-th child is accepted with probability R(x) / (Z q(x)),
    else R becomes relu(R - Z q), unless that is empty.
    """
    b, n, vocab = p.shape
    node = jnp.arange(n, dtype=jnp.int32)
    siblings = draft.parents[:, :, None] == draft.parents[:, None, :]
    mask = trees.ancestor_mask(draft.parents)
    alive = trees.depths(mask) < draft.depth  # deeper children are dead: nobody tries them
    rank = (siblings & (node[:, None] > node)).sum(-1, dtype=jnp.int32)
    rank = rank.at[:, 0].set(-1)
    row = jnp.arange(b)[:, None]

    def next_sibling(carry: tuple) -> tuple:
        k, residual, is_open, accepted = carry
        # child[j]: the k-th child of node j; n where there is none.
        parent = jnp.where(rank == k, draft.parents, n + node)
        child = jnp.full((b, n), n).at[row, parent].set(node, mode="drop", unique_indices=True)
        exists = (child < n) & alive
        child = jnp.minimum(child, n - 1)
        token = jnp.take_along_axis(draft.tokens, child, 1)
        if draft.probs is None:
            q = jax.nn.one_hot(token, vocab)
        else:
            q = jnp.take_along_axis(draft.probs, child[..., None], 1)
        total = residual.sum(-1)
        r_token = jnp.take_along_axis(residual, token[..., None], 2)[..., 0]
        q_token = jnp.take_along_axis(q, token[..., None], 2)[..., 0]
        ratio = r_token / jnp.maximum(total * q_token, _TINY)
        tried = exists & is_open
        wins = tried & bernoulli(rng_keys, context, "rejection.accept", ratio, k)
        left = jax.nn.relu(residual - total[..., None] * q)
        shrinks = tried & ~wins & (left.sum(-1) > 0)
        residual = jnp.where(shrinks[..., None], left, residual)
        taken = jnp.where(wins, child, n + node)
        accepted = accepted.at[row, taken].set(True, mode="drop", unique_indices=True)
        return k + 1, residual, is_open & ~wins, accepted

    start = (jnp.int32(0), p, jnp.ones((b, n), bool), jnp.broadcast_to(node == 0, (b, n)))
    _, residual, _, accepted = lax.while_loop(
        lambda carry: carry[0] <= rank.max(), next_sibling, start
    )
    last, path, num_nodes = trees.deepest(accepted, mask, draft.depth)
    return path, num_nodes, jnp.take_along_axis(residual, last[:, None, None], 1)[:, 0]
