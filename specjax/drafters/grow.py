"""Growing trees: which shape they take (`build`) and how a node's children are picked (`choose`).

A drafter that can predict one more token offers `expand`; a builder calls it level by level. So no
drafter knows tree shapes, and no builder knows models.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import trees
from specjax.kernels.vocabulary import argmax, softmax
from specjax.sampling import pick, private_noise, shared_noise, warp
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
    law: of a tree grown so; `static` knows where it amounts to "chain" or "paths".
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
    law = choose.law
    if t.is_chain and law not in ("point", "coupled"):
        law = "chain"
    elif t.is_bundle and law == "siblings":
        law = "paths"

    def grow(
        expand: Callable, rng_keys: Keys, context: Context, logits: Array, carry: Any
    ) -> Draft:
        b, vocab_size = logits.shape
        logits = logits[:, None]
        tokens, laws = [trees.root(context)], [jnp.zeros((b, 1, vocab_size))]
        for depth in range(1, t.depth + 1):
            level, above = t.levels[depth], t.levels[depth - 1]
            most = max(int((t.parents == node).sum()) for node in above)
            drawn, law = choose.draw(rng_keys, tied(context, logits), depth, logits, most)
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


def tied(context: Context, logits: Array) -> Context:
    """The same context, known no sooner than the logits.

    If the noise of all levels were ready at once, XLA on CPU would draw it on another thread, which
    the draft model's own passes need.
    """
    length = jnp.where(jnp.isnan(logits[:, 0, 0]), 0, context.length)
    return dataclasses.replace(context, length=length)


def chain(num_tokens: int, choose: Choose) -> Builder:
    """A single path of `num_tokens` drafted tokens."""
    return static(range(-1, num_tokens), choose)


def paths(num_paths: int, num_tokens: int, choose: Choose) -> Builder:
    """`num_paths` paths of `num_tokens` drafted tokens each, which meet in the root only."""
    nodes = range(1, num_paths * num_tokens + 1)
    return static([-1, *(max(i - num_paths, 0) for i in nodes)], choose)


def dynamic(num_nodes: int, width: int, depth: int) -> Builder:
    """A tree that grows where the draft is sure of itself: EAGLE-2, arXiv 2406.16858.

    A node's value is the draft's probability of its path. The `width` best of a level's candidates
    propose their `width` likeliest tokens as the next level's; in the end the best of all levels
    stay. Values are those of the draft's law at temperature 1, whatever rows sample with, so that a
    greedy row has an order too. Which candidates stay is no matter of chance: they are points.

    Args:
        num_nodes: of the tree, its root included.
        width: nodes that a level expands, and children that each of them proposes.
        depth: levels below the root, of which all but the last are expanded.

    Raises:
        ValueError: nothing to grow; more nodes than candidates; so few that some tree of that size
            is a chain and another one is not.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"A tree of width {width} and depth {depth} needs at least 1 of each.")
    most = 1 + width + (depth - 1) * width**2
    # One node more than a chain has, by which verifiers tell the two apart.
    least = depth + 1 + (width > 1)
    if not least <= num_nodes <= most:
        raise ValueError(
            f"A tree of {num_nodes} nodes cannot be picked from width {width} and depth {depth}, "
            f"which give {most - 1} candidates below the root; it needs {least} to {most} nodes."
        )

    def grow(
        expand: Callable, rng_keys: Keys, context: Context, logits: Array, carry: Any
    ) -> Draft:
        del rng_keys
        b, vocab_size = logits.shape
        if width > vocab_size:
            raise ValueError(f"Width {width} exceeds the draft's vocabulary of {vocab_size}.")
        logits = logits[:, None]
        # All candidates, the root first; parents by their places here.
        tokens, parents = [trees.root(context)], [jnp.zeros((b, 1), jnp.int32)]
        values = [jnp.zeros((b, 1))]
        # Of the nodes fed last: place, value, and their ancestors among all fed below the root.
        fed, value_of, seen = parents[0], jnp.zeros((b, 1)), jnp.zeros((b, 1, 0), bool)
        num_candidates = 1
        for level in range(1, depth + 1):
            proposed, law = _likeliest(logits, width)  # [B, W, width]
            found, value = proposed.reshape(b, -1), (value_of[..., None] + law).reshape(b, -1)
            tokens.append(found)
            parents.append(jnp.repeat(fed, width, 1))
            values.append(value)
            if level < depth:
                value_of, best = lax.top_k(value, width)
                fed, parent = num_candidates + best, best // width
                above = jnp.take_along_axis(seen, parent[..., None], 1)
                itself = jnp.broadcast_to(jnp.eye(width, dtype=bool), (b, width, width))
                seen = jnp.concatenate([above, itself], 2)
                chosen = jnp.take_along_axis(found, best, 1)
                logits, carry = expand(carry, chosen, parent, seen, level)
            num_candidates += found.shape[1]
        found, above, value = (jnp.concatenate(x, 1) for x in (tokens, parents, values))
        found, above, _ = trees.best_subtree(found, above, value, num_nodes)
        return Draft(
            tokens=found,
            parents=above,
            probs=None,
            num_drafted=jnp.full([b], num_nodes - 1, jnp.int32),
            depth=depth,
        )

    return Builder(grow, Proposal("point", num_nodes, depth))


def _likeliest(logits: Array, k: int) -> tuple[Array, Array]:
    """The k likeliest tokens [..., k] and their log-probabilities, none of them above 0."""
    top, tokens = lax.top_k(logits, k)
    peak = top.max(-1, keepdims=True)  # of a slice XLA on CPU would make a sort of all tokens
    # The sum holds an exact 1, so its logarithm is no less than 0.
    return tokens, top - peak - jnp.log(jnp.exp(logits - peak).sum(-1, keepdims=True))


def merged(build: Builder) -> Builder:
    """Joins nodes of equal strings, the eldest taking the others' children.

    A duplicate stays where it was drawn as a filler that nobody accepts: a younger sibling of the
    same token with a one-hot law. Siblings drawn after it have the law of what their elders left.

    Raises:
        ValueError: the tree's siblings are not drawn independently.
    """
    law, num_nodes, depth = build.proposal
    if law not in ("chain", "paths", "siblings"):
        raise ValueError(
            f"Only independent siblings can be merged, but these have law {law!r}; "
            "choose them with independent()."
        )

    def grow(
        expand: Callable, rng_keys: Keys, context: Context, logits: Array, carry: Any
    ) -> Draft:
        draft = build.grow(expand, rng_keys, context, logits, carry)
        parent = jnp.maximum(draft.parents, 0)
        same_token = draft.tokens[:, :, None] == draft.tokens[:, None, :]
        both_roots = (draft.parents[:, :, None] < 0) & (draft.parents[:, None, :] < 0)
        same = both_roots
        for _ in range(depth):  # equal strings so far, one level more at a time
            above = jax.vmap(lambda same, parent: same[parent][:, parent])(same, parent)
            below = (draft.parents[:, :, None] >= 0) & (draft.parents[:, None, :] >= 0)
            same = both_roots | below & above & same_token
        eldest = jnp.argmax(same, -1).astype(jnp.int32)  # [B, N]
        node = jnp.arange(num_nodes, dtype=jnp.int32)
        parents = jnp.where(draft.parents < 0, -1, jnp.take_along_axis(eldest, parent, 1))
        elder = (parents[:, :, None] == parents[:, None, :]) & (node[:, None] > node)
        hot = jax.nn.one_hot(draft.tokens, draft.probs.shape[-1], dtype=draft.probs.dtype)
        taken = jnp.einsum("bij,bjv->biv", elder.astype(hot.dtype), hot) > 0
        left = jnp.where(taken, 0.0, draft.probs)
        left = left / jnp.maximum(left.sum(-1, keepdims=True), jnp.finfo(left.dtype).tiny)
        is_filler = eldest != node
        return Draft(
            tokens=draft.tokens,
            parents=parents,
            probs=jnp.where(is_filler[..., None], hot, left),
            num_drafted=draft.num_drafted - is_filler.sum(-1, dtype=jnp.int32),
            depth=depth,
        )

    return Builder(grow, Proposal("chain" if law == "chain" else "general", num_nodes, depth))


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
    return Choose(_one_after_another(_private_noise), "general")


def coupled() -> Choose:
    """The same with the noise the target itself will use for that position.

    Under `match` such drafts are accepted almost as often as under rejection sampling (arXiv
    2408.07978).
    """

    def noise(rng_keys: Keys, context: Context, depth: int, shape: tuple[int, ...]) -> Array:
        position = context.length[:, None] - 1 + depth
        # [B, 1, opaque], one for the level
        return shared_noise(rng_keys, context, position, shape[-1])

    return Choose(_one_after_another(noise), "coupled")


def hybrid() -> Choose:
    """The k - 1 likeliest tokens as point masses, then one drawn from the rest of the law.

    Hu et al., arXiv 2502.18779, whose optimal rule for such siblings is `verifiers.hybrid`.
    """
    return Choose(_one_after_another(_private_noise, num_sampled=1), "hybrid")


def _private_noise(rng_keys: Keys, context: Context, depth: int, shape: tuple[int, ...]) -> Array:
    return private_noise(rng_keys, context, "draft", shape[1:], depth)


def _one_after_another(noise: Callable, num_sampled: int | None = None) -> Callable:
    """Picks k distinct tokens, the last `num_sampled` at random (by default all), others likeliest.

    Given its elders, a child's law is the warped law without their tokens. Once that is exhausted
    the best untried token by the unwarped logits follows, as a point mass.
    """

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        weights = warp(logits, context.sampling)
        source = noise(rng_keys, context, depth, logits.shape)
        source = jnp.broadcast_to(source, (*logits.shape[:-1], source.shape[-1]))
        num_likeliest = 0 if num_sampled is None else k - num_sampled
        tried, tokens, laws = jnp.zeros(logits.shape, bool), [], []
        for child in range(k):
            law = _untried(weights, tried)
            if child >= num_likeliest:
                if child > 0:
                    law = jnp.where(_exhausted(law), _point(_untried(logits, tried)), law)
                tokens.append(pick(rng_keys, source, law, child - num_likeliest))
            else:
                law = _point(jnp.where(_exhausted(law), _untried(logits, tried), law))
                tokens.append(argmax(law))
            laws.append(law)
            tried |= jax.nn.one_hot(tokens[-1], logits.shape[-1], dtype=bool)
        return jnp.stack(tokens, -1), jnp.stack(laws, 2)

    return draw


def _exhausted(log_weights: Array) -> Array:
    return log_weights.max(-1, keepdims=True) == -jnp.inf


def _point(log_weights: Array) -> Array:
    """All weight on the likeliest token."""
    hot = jax.nn.one_hot(argmax(log_weights), log_weights.shape[-1], dtype=bool)
    return jnp.where(hot, 0.0, -jnp.inf)


def independent() -> Choose:
    """k tokens drawn independently from the warped draft law; duplicates stay."""

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        b, w, vocab_size = logits.shape
        law = jnp.broadcast_to(warp(logits, context.sampling)[:, :, None], (b, w, k, vocab_size))
        noise = private_noise(rng_keys, context, "draft", (w, k, vocab_size), depth)
        return pick(rng_keys, noise, law), law

    return Choose(draw, "siblings")
