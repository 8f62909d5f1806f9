"""Traversal verification: leaves are judged first, each as the end of a whole path.

Weng et al. (arXiv 2505.12398), which on a chain is block verification. A node of token x has weight
w = min(1, w_u R_u(x) / q(x)), where u is its parent and R_u what is left of the target's law there;
the root weighs 1. Depth first, the current leaf is accepted with probability w, and the next token
comes from its R. If it is rejected it is deleted: with s = sum relu(w_u R_u - q), R_u becomes
norm(relu(w_u R_u - q)) and w_u becomes s / (s + 1 - w_u). A parent without children left is a leaf.

`Draft.probs` holds each node's law given its elders, so that the rule covers siblings drawn with
and without replacement, point masses beside them, and merged paths.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels.vocabulary import peak
from specjax.sampling import bernoulli, categorical
from specjax.types import LAWS, Array, Context, Draft, Keys, ModelOutput, Params, Verdict, Verifier
from specjax.verifiers.block import offered
from specjax.verifiers.rejection import eldest_child, next_sibling, points, rows_at

_TINY = 1e-37  # a ratio's denominator; smaller floats may be flushed to zero


def traversal() -> Verifier:
    """Bottom-up verification, lossless wherever branches share no randomness."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        del params, output
        if draft.probs is None:  # then the order of trying makes no difference
            return points(rng_keys, context, draft, warped, "traversal.next")
        return _traverse(rng_keys, context, draft, draft.probs, warped)

    return Verifier(verify, tuple(law for law in LAWS if law != "coupled"))


class _Path(NamedTuple):
    """The way from the root to the current leaf, an entry for each depth; garbage below the leaf.

    `left` is R of the nodes whose children are being tried, and of a leaf that had children,
    unnormalised. Its entry for depth D, where nobody has children, takes what is not to be kept.
    """

    node: Array  # [B, P] int32
    weight: Array  # [B, P]
    left: Array  # [B, P, V]
    total: Array  # [B, P], the sum of `left`


def _traverse(rng_keys: Keys, context: Context, draft: Draft, q: Array, warped: Array) -> Verdict:
    """One round for every leaf that is rejected; rows that have accepted stay as they are."""
    b, n, vocab = warped.shape
    row, depths = jnp.arange(b), jnp.arange(draft.depth + 1)
    eldest, younger = eldest_child(draft.parents), next_sibling(draft.parents)

    def store(path: _Path, keep: Array, depth: Array, law: Array, total: Array) -> _Path:
        place = jnp.where(keep, depth, draft.depth)
        put = jax.vmap(lax.dynamic_update_index_in_dim, (0, 0, 0, None))
        totals = jnp.where(depths == place[:, None], total[:, None], path.total)
        return path._replace(left=put(path.left, law, place, 0), total=totals)

    def extend(path: _Path, depth: Array, child: Array) -> _Path:
        """Adds the child to be tried next, N for none, to the node at `depth`."""
        tried = jnp.minimum(child, n - 1)
        token = draft.tokens[row, tried]
        p = path.left[row, depth, token] / _at(path.total, depth)
        ratio = p / jnp.maximum(q[row, tried, token], _TINY)
        weight = jnp.minimum(1, _at(path.weight, depth) * ratio)
        here = (depths == depth[:, None] + 1) & (child < n)[:, None]
        return path._replace(
            node=jnp.where(here, child[:, None], path.node),
            weight=jnp.where(here, weight[:, None], path.weight),
        )

    def descend(path: _Path, depth: Array, is_new: Array) -> tuple[_Path, Array]:
        """From nodes none of whose children were tried on to the first leaf below.

        Below weight 0 everything weighs 0, and rejecting it leaves that so: no need to go there.
        """

        def eldest_below(path: _Path, depth: Array, is_new: Array) -> Array:
            child = eldest[row, _at(path.node, depth)]
            enters = is_new & (depth < draft.depth) & (_at(path.weight, depth) > 0)
            return jnp.where(enters, child, n)

        def enter(carry: tuple) -> tuple:
            path, depth, child = carry
            is_new = child < n
            law = rows_at(warped, _at(path.node, depth))
            mass = jnp.exp(law - peak(law))
            path = store(path, is_new, depth, mass, mass.sum(-1))
            path = extend(path, depth, child)
            depth = depth + is_new
            return path, depth, eldest_below(path, depth, is_new)

        start = (path, depth, eldest_below(path, depth, is_new))
        path, depth, _ = lax.while_loop(lambda carry: (carry[2] < n).any(), enter, start)
        return path, depth

    def accept(i: Array, path: _Path, depth: Array, accepted: Array) -> Array:
        is_sure = accepted | (depth == 0)
        chance = jnp.where(is_sure, 1.0, _at(path.weight, depth))
        return is_sure | bernoulli(rng_keys, context, "traversal.accept", chance, i)

    def reject(carry: tuple) -> tuple:
        i, path, depth, accepted = carry
        leaf, above = _at(path.node, depth), jnp.maximum(depth - 1, 0)
        w = _at(path.weight, above)
        scale = w / _at(path.total, above)
        excess = jax.nn.relu(scale[:, None] * rows_at(path.left, above) - rows_at(q, leaf))
        s = excess.sum(-1)
        path = store(path, ~accepted & (s > 0), above, excess, s)
        here = (depths == above[:, None]) & ~accepted[:, None]
        weight = jnp.where(here, offered(s, w)[:, None], path.weight)
        sibling = jnp.where(accepted, n, younger[row, leaf])
        path = extend(path._replace(weight=weight), above, sibling)
        is_new = sibling < n
        depth = jnp.where(accepted | is_new, depth, above)
        path, depth = descend(path, depth, is_new)
        return i + 1, path, depth, accept(i + 1, path, depth, accepted)

    path = _Path(
        node=jnp.zeros((b, draft.depth + 1), jnp.int32),
        weight=jnp.ones((b, draft.depth + 1), warped.dtype),
        left=jnp.zeros((b, draft.depth + 1, vocab), warped.dtype),
        total=jnp.ones((b, draft.depth + 1), warped.dtype),
    )
    path, depth = descend(path, jnp.zeros([b], jnp.int32), jnp.ones([b], bool))
    accepted = accept(jnp.int32(0), path, depth, jnp.zeros([b], bool))
    start = (jnp.int32(0), path, depth, accepted)
    _, path, depth, _ = lax.while_loop(lambda carry: ~carry[3].all(), reject, start)
    leaf = _at(path.node, depth)
    had_children = (eldest[row, leaf] < n) & (depth < draft.depth)
    law = jnp.log(rows_at(path.left, depth))
    law = jnp.where(had_children[:, None], law, rows_at(warped, leaf))
    next_token = categorical(rng_keys, context, "traversal.next", law)
    node = jnp.where(depths <= depth[:, None], path.node, 0)
    return Verdict(node, depth + 1, next_token)


def _at(x: Array, depth: Array) -> Array:
    """[B, P], [B] -> [B]."""
    return jnp.take_along_axis(x, depth[:, None], 1)[:, 0]
