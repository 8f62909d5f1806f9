"""Growing trees: which shape they take (`build`) and how a node's children are picked (`choose`).

A drafter that can predict one more token offers `expand`; a builder calls it level by level. So no
drafter knows tree shapes, and no builder knows models.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import trees
from specjax.sampling import argmax, private_gumbel, shared_gumbel, softmax, warp
from specjax.types import Array, Context, Draft, Keys, Proposal


class Builder(NamedTuple):
    """Grows one draft.

    grow: (expand, rng_keys, context, logits [B, V] at the root, carry) -> Draft, where
    expand: (carry, tokens [B, W], parents [B, W], mask [B, W, M], depth) -> (logits [B, W, V],
        carry) feeds W new nodes of one depth. `parents` are their parents' places in the level
        above; M counts the nodes fed so far below the root, the new ones last.
    """

    grow: Callable
    proposal: Proposal


class Choose(NamedTuple):
    """Picks children.

    draw: (rng_keys, context, depth, logits [B, W, V], k) -> (tokens [B, W, k],
        log-weights [B, W, k, V] of the laws they were drawn from, or None), for the k children at
        `depth` of each of W nodes.
    law: of a tree grown so; on a single path, "chain" unless it is point or coupled.
    """

    draw: Callable
    law: str


def static(parents: Sequence[int], choose: Choose) -> Builder:
    """A tree whose shape is fixed in advance.

    Args:
        parents: each node's parent, breadth first; -1 for the root.
        choose: how children are picked.

    Raises:
        ValueError: the tree is impossible, or consists of its root alone.
    """
    t = trees.topology(parents)
    if t.depth == 0:
        raise ValueError(f"Tree {tuple(parents)} is its root alone; a draft needs another node.")
    law = "chain" if t.is_chain and choose.law not in ("point", "coupled") else choose.law

    def grow(
        expand: Callable, rng_keys: Keys, context: Context, logits: Array, carry: Any
    ) -> Draft:
        b, vocab_size = logits.shape
        logits = logits[:, None]
        tokens, laws = [trees.root(context)], [jnp.zeros((b, 1, vocab_size))]
        for depth in range(1, t.depth + 1):
            level, above = t.levels[depth], t.levels[depth - 1]
            most = max(int((t.parents == node).sum()) for node in above)
            drawn, law = choose.draw(rng_keys, context, depth, logits, most)
            parent = np.searchsorted(above, t.parents[level])
            tokens.append(drawn[:, parent, t.rank[level]])
            if law is not None:
                laws.append(law[:, parent, t.rank[level]])
            if depth < t.depth:
                seen = t.mask[np.ix_(level, np.arange(1, level[-1] + 1))]
                logits, carry = expand(
                    carry,
                    tokens[-1],
                    jnp.broadcast_to(jnp.asarray(parent), (b, len(level))),
                    jnp.broadcast_to(jnp.asarray(seen), (b, *seen.shape)),
                    depth,
                )
        return Draft(
            tokens=jnp.concatenate(tokens, 1),
            parents=jnp.broadcast_to(jnp.asarray(t.parents, jnp.int32), (b, len(t.parents))),
            # One softmax for all levels: small operations cost by their number.
            probs=softmax(jnp.concatenate(laws, 1)) if len(laws) > 1 else None,
            num_drafted=jnp.full([b], len(t.parents) - 1, jnp.int32),
            depth=t.depth,
        )

    return Builder(grow, Proposal(law, len(t.parents), t.depth))


def chain(num_tokens: int, choose: Choose) -> Builder:
    """A single path of `num_tokens` drafted tokens."""
    return static(range(-1, num_tokens), choose)


# ------------------------------------------------------------------- how children are picked


def _untried(log_weights: Array, tried: Array) -> Array:
    return jnp.where(tried, -jnp.inf, log_weights)


def best() -> Choose:
    """The k likeliest tokens, as point masses."""

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, None]:
        del rng_keys, context, depth
        tried, tokens = jnp.zeros(logits.shape, bool), []
        for _ in range(k):  # k is small, and XLA's top_k on CPU costs more than a few reductions
            tokens.append(argmax(_untried(logits, tried)))
            tried |= jax.nn.one_hot(tokens[-1], logits.shape[-1], dtype=bool)
        return jnp.stack(tokens, -1), None

    return Choose(draw, "point")


def without_replacement() -> Choose:
    """k distinct tokens drawn one after another from the warped draft law (Gumbel top-k)."""

    def noise(rng_keys: Keys, context: Context, depth: int, shape: tuple[int, ...]) -> Array:
        return private_gumbel(rng_keys, context, "draft", shape[1:], depth)

    return Choose(_gumbel_top_k(noise), "general")


def coupled() -> Choose:
    """The same with the noise the target itself will use for that position.

    Under `match` such drafts are accepted almost as often as under rejection sampling (arXiv
    2408.07978).
    """

    def noise(rng_keys: Keys, context: Context, depth: int, shape: tuple[int, ...]) -> Array:
        position = context.length[:, None] - 1 + depth
        return shared_gumbel(rng_keys, position, shape[-1])  # [B, 1, V], one for the level

    return Choose(_gumbel_top_k(noise), "coupled")


def _gumbel_top_k(noise: Callable) -> Callable:
    """Draws without replacement: the j-th largest of log-weights plus Gumbel noise, j = 1 .. k.

    Given its elders, a child's law is the warped law without their tokens. Once that is exhausted
    the best untried token by the unwarped logits follows, as a point mass.
    """

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        weights = warp(logits, context.sampling)
        perturbed = lax.cond(
            (context.sampling.temperature > 0).any(),
            lambda x: x + noise(rng_keys, context, depth, x.shape),
            lambda x: x,
            weights,
        )
        tried, tokens, laws = jnp.zeros(logits.shape, bool), [], []
        for child in range(k):
            law, score = _untried(weights, tried), _untried(perturbed, tried)
            if child > 0:
                exhausted = law.max(-1, keepdims=True) == -jnp.inf
                score = jnp.where(exhausted, _untried(logits, tried), score)
            tokens.append(argmax(score))
            hot = jax.nn.one_hot(tokens[-1], logits.shape[-1], dtype=bool)
            if child > 0:
                law = jnp.where(exhausted, jnp.where(hot, 0.0, -jnp.inf), law)
            laws.append(law)
            tried |= hot
        return jnp.stack(tokens, -1), jnp.stack(laws, 2)

    return draw


def independent() -> Choose:
    """k tokens drawn independently from the warped draft law; duplicates stay."""

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        b, w, vocab_size = logits.shape
        law = warp(logits, context.sampling)[:, :, None]
        noise = private_gumbel(rng_keys, context, "draft", (w, k, vocab_size), depth)
        return argmax(law + noise), jnp.broadcast_to(law, (b, w, k, vocab_size))

    return Choose(draw, "siblings")
