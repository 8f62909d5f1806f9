"""Speculative sampling: accept a token with probability min(1, p / q), else draw from the residual.

Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318) on a chain; on a tree the
siblings are tried in storage order against a shrinking residual, which covers SpecInfer (arXiv
2305.09781, i.i.d. siblings), RSD and Sequoia (arXiv 2402.14160, 2402.12374, without replacement)
and deterministic siblings alike, because `Draft.probs` holds each node's law given its elders.
"""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels.vocabulary import peak, softmax
from specjax.sampling import bernoulli, categorical
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
        if draft.probs is None:
            return points(rng_keys, context, draft, warped, "rejection.next")
        rule = _chain if draft.tokens.shape[1] == draft.depth + 1 else _tree
        path, num_nodes, residual = rule(rng_keys, context, draft, draft.probs, warped)
        next_token = categorical(rng_keys, context, "rejection.next", jnp.log(residual))
        return Verdict(path, num_nodes, next_token)

    return Verifier(verify, LAWS)


def points(rng_keys: Keys, context: Context, draft: Draft, warped: Array, site: str) -> Verdict:
    """The verdict on point masses: draw a token from p, and go on from the child that has it.

    A point mass on x is accepted with probability p(x) and otherwise leaves p without x, so what
    follows a node, a child's token or the target's own, has law p in whatever order children are
    tried. A rule that tries them all stops where its output leaves the tree: given losslessness,
    that fixes the law of the verdict. One draw for each node on the path replaces the trials.
    """
    b, n = draft.tokens.shape
    nodes, depths = jnp.arange(n, dtype=jnp.int32), jnp.arange(draft.depth + 1)
    ids = jnp.arange(warped.shape[-1])

    def visit(carry: tuple) -> tuple:
        depth, node, is_open, path, token = carry
        path = jnp.where((depths == depth) & is_open[:, None], node[:, None], path)
        again = jnp.where(ids == token[:, None], 0.0, -jnp.inf)  # a row that has stopped
        law = jnp.where(is_open[:, None], rows_at(warped, node), again)
        token = categorical(rng_keys, context, site, law, depth)
        has_token = (draft.parents == node[:, None]) & (draft.tokens == token[:, None])
        child = jnp.where(has_token, nodes, n).min(-1)
        is_open &= (child < n) & (depth < draft.depth)
        return depth + 1, jnp.where(is_open, child, node), is_open, path, token

    zero = jnp.zeros([b], jnp.int32)
    path = jnp.full((b, draft.depth + 1), -1, jnp.int32)
    start = (jnp.int32(0), zero, jnp.ones([b], bool), path, zero)
    _, _, _, path, token = lax.while_loop(lambda carry: carry[2].any(), visit, start)
    return Verdict(jnp.maximum(path, 0), (path >= 0).sum(-1, dtype=jnp.int32), token)


def _chain(
    rng_keys: Keys, context: Context, draft: Draft, q: Array, warped: Array
) -> tuple[Array, Array, Array]:
    """The closed form: m accepted tokens, residual norm(relu(p_m - q_{m+1})), q past the end 0."""
    n = warped.shape[1]
    tokens = draft.tokens[:, 1:, None]  # [B, D, 1]
    p = softmax(warped)
    p_token = jnp.take_along_axis(p[:, :-1], tokens, 2)[..., 0]
    q_token = jnp.take_along_axis(q[:, 1:], tokens, 2)[..., 0]
    ratio = p_token / jnp.maximum(q_token, _TINY)
    accepted = bernoulli(rng_keys, context, "rejection.accept", ratio)
    m = jnp.cumprod(accepted, 1).sum(1, dtype=jnp.int32)
    p_m = rows_at(p, m)
    q_m = rows_at(q, jnp.minimum(m + 1, n - 1))
    residual = jax.nn.relu(p_m - jnp.where((m == n - 1)[:, None], 0.0, q_m))
    residual = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p_m)
    path = jnp.arange(n, dtype=jnp.int32)
    return jnp.where(path <= m[:, None], path, 0), m + 1, residual


def _tree(
    rng_keys: Keys, context: Context, draft: Draft, q: Array, warped: Array
) -> tuple[Array, Array, Array]:
    """A walk down the tree, which reads the laws of the nodes on its way only.

    With R = p at first, unnormalised, and Z = sum R: a child is accepted with probability
    R(x) / (Z q(x)), else R becomes relu(R - Z q), unless that is empty.
    """
    b, n, vocab = warped.shape
    row, depths = jnp.arange(b), jnp.arange(draft.depth + 1)
    eldest, younger = eldest_child(draft.parents), next_sibling(draft.parents)

    def visit(carry: tuple) -> tuple:
        depth, node, is_open, path, residual = carry
        path = jnp.where((depths == depth) & is_open[:, None], node[:, None], path)
        law = rows_at(warped, node)
        residual = jnp.where(is_open[:, None], jnp.exp(law - peak(law)), residual)

        def accept(k: Array, child: Array, residual: Array, total: Array) -> Array:
            """Tries each row's k-th child; N is none."""
            tried = jnp.minimum(child, n - 1)
            token = draft.tokens[row, tried]
            q_token = q[row, tried, token]
            ratio = residual[row, token] / jnp.maximum(total * q_token, _TINY)
            chance = jnp.where(child < n, ratio, 0.0)
            return bernoulli(rng_keys, context, "rejection.accept", chance, depth * n + k)

        def reject(carry: tuple) -> tuple:
            k, child, accepted, residual, total = carry
            is_rejected = (child < n) & ~accepted
            tried = jnp.minimum(child, n - 1)
            left = jax.nn.relu(residual - total[:, None] * rows_at(q, tried))
            mass = left.sum(-1)
            shrinks = is_rejected & (mass > 0)
            residual = jnp.where(shrinks[:, None], left, residual)
            total = jnp.where(shrinks, mass, total)
            following = jnp.where(is_rejected, younger[row, tried], n)
            accepted |= accept(k + 1, following, residual, total)
            return k + 1, jnp.where(is_rejected, following, child), accepted, residual, total

        total = residual.sum(-1)
        child = jnp.where(is_open & (depth < draft.depth), eldest[row, node], n)
        accepted = accept(jnp.int32(0), child, residual, total)
        _, child, accepted, residual, _ = lax.while_loop(
            lambda carry: ((carry[1] < n) & ~carry[2]).any(),
            reject,
            (jnp.int32(0), child, accepted, residual, total),
        )
        return depth + 1, jnp.where(accepted, child, node), accepted, path, residual

    zero = jnp.zeros([b], jnp.int32)
    path = jnp.full((b, draft.depth + 1), -1, jnp.int32)
    start = (jnp.int32(0), zero, jnp.ones([b], bool), path, jnp.zeros((b, vocab), warped.dtype))
    _, _, _, path, residual = lax.while_loop(lambda carry: carry[2].any(), visit, start)
    return jnp.maximum(path, 0), (path >= 0).sum(-1, dtype=jnp.int32), residual


def rows_at(x: Array, node: Array) -> Array:
    """Each row's entry for its own node: [B, N, V], [B] -> [B, V]."""
    return jnp.take_along_axis(x, node[:, None, None], 1)[:, 0]


def eldest_child(parents: Array) -> Array:
    """Each node's first child in storage order, [B, N]; N where there is none."""
    node = jnp.arange(parents.shape[1], dtype=jnp.int32)
    is_child = parents[:, None, :] == node[:, None]
    return jnp.where(is_child, node, len(node)).min(-1)


def next_sibling(parents: Array) -> Array:
    """The child of the same parent that follows each node in storage order, [B, N]; N if none."""
    node = jnp.arange(parents.shape[1], dtype=jnp.int32)
    is_younger = (parents[:, None, :] == parents[:, :, None]) & (node > node[:, None])
    return jnp.where(is_younger, node, len(node)).min(-1)
