"""Greedy multi-path block verification: of K independent paths the best is judged as a block.

Thomas and Pal (arXiv 2602.16961). At every node tokens are ordered by min(1, p / q), ties by id,
and of the drafted paths the largest in lexicographic order is taken. So a string of probability x,
with strings of mass A below it, begins that path with probability (A + x)^K - A^K, and token t,
with tokens of mass F(t) below it, follows the string with

    q_skew(t) = (a^K - b^K) / ((A + x)^K - A^K),  b = A + x F(t),  a = b + x q(t).

Block verification then judges the path as a chain drawn from q_skew.
"""

import jax.numpy as jnp
from jax import lax

from specjax import trees
from specjax.kernels.below import below
from specjax.kernels.vocabulary import softmax
from specjax.types import Array, Context, Draft, Keys, ModelOutput, Params, Verdict, Verifier
from specjax.verifiers.block import block
from specjax.verifiers.rejection import eldest_child, rows_at

_TINY = 1e-37  # a ratio's denominator; smaller floats may be flushed to zero


def gbv() -> Verifier:
    """Lossless for independent paths; a single one is left to block verification as it is."""
    judge = block().verify

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        num_paths = (draft.tokens.shape[1] - 1) // max(draft.depth, 1)
        if num_paths <= 1 or draft.probs is None:
            return judge(params, rng_keys, context, draft, output, warped)
        path, ratio = _largest(draft, draft.probs, warped, num_paths)
        tokens = jnp.take_along_axis(draft.tokens, path, 1)
        q = jnp.take_along_axis(draft.probs, path[:, 1:, None], 1)
        q = _skewed(q, below(ratio, q), tokens[:, 1:], num_paths)
        chain = trees.chain(tokens, jnp.pad(q, ((0, 0), (1, 0), (0, 0))))
        along = jnp.take_along_axis(warped, path[..., None], 1)
        verdict = judge(params, rng_keys, context, chain, output, along)
        return verdict.replace(path=jnp.take_along_axis(path, verdict.path, 1))

    return Verifier(verify, ("chain", "paths"))


def _largest(draft: Draft, probs: Array, warped: Array, num_paths: int) -> tuple[Array, Array]:
    """The path taken [B, P] and the ratio min(1, p / q) along it [B, D, V].

    Paths that agree so far are at nodes of the same string, and so of the same laws.
    """
    b, n = draft.parents.shape
    eldest = eldest_child(draft.parents)
    ids = jnp.arange(n, dtype=jnp.int32)
    heads = jnp.sort(jnp.where(draft.parents == 0, ids, n), -1)[:, :num_paths]

    def down(carry: tuple, _: None) -> tuple:
        node, heads, is_largest = carry
        p = softmax(rows_at(warped, node))
        q = rows_at(probs, _first(is_largest, heads))
        # One order: what is compared here has to be, to the bit, what is sorted later.
        ratio = lax.optimization_barrier(jnp.minimum(p / jnp.maximum(q, _TINY), 1.0))
        tokens = jnp.take_along_axis(draft.tokens, heads, 1)
        height = jnp.where(is_largest, jnp.take_along_axis(ratio, tokens, 1), -1.0)
        highest = height == height.max(-1, keepdims=True)
        is_largest = highest & (tokens == jnp.where(highest, tokens, -1).max(-1, keepdims=True))
        children = jnp.take_along_axis(eldest, heads, 1)
        return (_first(is_largest, heads), children, is_largest), (heads, ratio)

    start = (jnp.zeros([b], jnp.int32), heads, jnp.ones(heads.shape, bool))
    levels: tuple[Array, Array]
    (_, _, is_largest), levels = lax.scan(down, start, length=draft.depth)
    heads, ratio = (jnp.moveaxis(x, 0, 1) for x in levels)  # [B, D, K], [B, D, V]
    taken = jnp.argmax(is_largest, -1)[:, None, None]
    path = jnp.take_along_axis(heads, taken, 2)[..., 0]
    return jnp.pad(path, ((0, 0), (1, 0))), ratio


def _first(is_largest: Array, heads: Array) -> Array:
    """The node [B] of the first path that is among the largest; [B, K], [B, K]."""
    return jnp.take_along_axis(heads, jnp.argmax(is_largest, -1, keepdims=True), 1)[:, 0]


def _skewed(q: Array, f: Array, tokens: Array, num_paths: int) -> Array:
    """q_skew [B, D, V] from q and F [B, D, V] along the path of `tokens` [B, D]."""
    q_token, f_token = (jnp.take_along_axis(y, tokens[..., None], 2)[:, :-1] for y in (q, f))
    first = ((0, 0), (1, 0), (0, 0))
    x = jnp.pad(jnp.cumprod(q_token, 1), first, constant_values=1.0)  # [B, D, 1]
    lower = jnp.pad(jnp.cumsum(x[:, :-1] * f_token, 1), first)
    # Only shares of their sum stay in range, for strings are long.
    total = jnp.maximum(x + lower, _TINY)
    x, lower = jnp.where(x + lower > _TINY, x / total, 1.0), lower / total
    b = lower + x * f
    # a - b is x q(t), and the differences of powers have it for a factor.
    return q * _power_sum(b + x * q, b, num_paths) / _power_sum(x + lower, lower, num_paths)


def _power_sum(a: Array, b: Array, k: int) -> Array:
    """(a^k - b^k) / (a - b) without the difference: the sum of a^i b^(k - 1 - i)."""
    total = power = jnp.ones_like(a)
    for _ in range(k - 1):
        power = power * b
        total = total * a + power
    return total
