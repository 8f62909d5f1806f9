"""Top-down verification: at every node one token of the target's is coupled to the drafted ones.

A node's rule accepts one of the children, tried in storage order, or else draws a token from a
residual law. Over all draws of the children that token has the target's law, which is all that
losslessness asks (SpecTr's optimal transport with membership cost, arXiv 2310.15141). If it is a
child's, accepted or met by the residual, the walk goes on from the first child that has it;
otherwise, and at a leaf, it is the token that the target adds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels.vocabulary import softmax
from specjax.sampling import categorical
from specjax.types import Array, Context, Draft, Keys, ModelOutput, Params, Verdict
from specjax.verifiers.rejection import points, rows_at

_TINY = 1e-37  # a ratio's denominator; smaller floats may be flushed to zero


def descent(name: str, rule: Callable) -> Callable:
    """A verifier's `verify` from its rule for one node.

    Args:
        name: of the verifier, which draws at `name.child` and `name.next`, indexed by depth.
        rule: (p [B, V], q [B, V], ratio [B, N], is_child [B, N]) -> (accept [B, N], residual
            [B, V]): how likely each child is accepted once it is tried, and the weights of the
            token if none is. p is the target's law, q that of the last child, 0 where there is
            none, and ratio p / q of each node's token. Without children the residual is p.
    """

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        del params, output
        probs = draft.probs
        if probs is None:
            return points(rng_keys, context, draft, warped, f"{name}.next")
        b, n, vocab_size = warped.shape
        ids = jnp.arange(n, dtype=jnp.int32)

        def visit(carry: tuple) -> tuple:
            depth, node, is_open, path, num_nodes, token = carry
            path = path.at[:, depth].set(jnp.where(is_open, node, 0))
            is_child = (draft.parents == node[:, None]) & (depth < draft.depth)
            last = jnp.where(is_child, ids, 0).max(-1)
            p = softmax(rows_at(warped, node))
            q = jnp.where((last > 0)[:, None], rows_at(probs, last), 0.0)
            p_token, q_token = (jnp.take_along_axis(x, draft.tokens, 1) for x in (p, q))
            accept, residual = rule(p, q, p_token / jnp.maximum(q_token, _TINY), is_child)
            # One draw says which child is the first to be accepted, n that none is.
            accept = jnp.where(is_child & is_open[:, None], jnp.minimum(accept, 1.0), 0.0)
            missed = jnp.cumprod(1 - accept, -1)
            first = accept * jnp.pad(missed[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
            outcomes = jnp.concatenate([first, missed[:, -1:]], -1)
            child = categorical(rng_keys, context, f"{name}.child", jnp.log(outcomes), depth)
            accepted = jnp.take_along_axis(draft.tokens, jnp.minimum(child, n - 1)[:, None], 1)
            token = jnp.where(child < n, accepted[:, 0], token)
            settled = (child < n) | ~is_open

            def draw() -> Array:
                hot = jax.nn.one_hot(token, vocab_size, dtype=p.dtype)
                rest = jnp.where(residual.sum(-1, keepdims=True) > 0, residual, p)
                weights = jnp.log(jnp.where(settled[:, None], hot, rest))
                return categorical(rng_keys, context, f"{name}.next", weights, depth)

            token = lax.cond(settled.all(), lambda: token, draw)
            found = jnp.where(is_child & (draft.tokens == token[:, None]), ids, n).min(-1)
            goes_on = is_open & (found < n)
            node = jnp.where(goes_on, found, node)
            return depth + 1, node, goes_on, path, num_nodes + is_open, token

        zero, path = jnp.zeros([b], jnp.int32), jnp.zeros((b, draft.depth + 1), jnp.int32)
        start = (jnp.int32(0), zero, jnp.ones([b], bool), path, zero, zero)
        _, _, _, path, num_nodes, token = lax.while_loop(lambda carry: carry[2].any(), visit, start)
        return Verdict(path, num_nodes, token)

    return verify
