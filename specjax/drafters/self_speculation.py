"""Drafting with the target itself, made cheaper: what all such drafters share.

Fewer layers, fewer slots of the cache or fewer bits: in each case the draft reads the very keys and
values that the target has cached, so that it has no cache of its own, no history to absorb and
nothing to roll back (Zhang et al., *Draft & verify*, arXiv 2309.08168). The target has cached
everything before the root, which is therefore the first token that a draft feeds.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from specjax import trees
from specjax.drafters.grow import Builder
from specjax.types import (
    Array,
    Block,
    Cache,
    Context,
    Draft,
    Drafter,
    Keys,
    Outcome,
    Params,
    PyTree,
)


def grow_from_root(
    apply: Callable,
    params: PyTree,
    cache: Cache,
    build: Builder,
    rng_keys: Keys,
    context: Context,
) -> Draft:
    """Feeds the root and grows a tree below it.

    Args:
        apply: a `Model.apply`.
        params: its weights.
        cache: what it reads of the target's, which holds everything before the root.
        build: the tree.
        rng_keys: of the row.
        context: of the step.
    """

    def expand(
        block: Block | None, tokens: Array, parents: Array, mask: Array, depth: int
    ) -> tuple[Array, Block]:
        del parents
        mask = jnp.pad(mask, ((0, 0), (0, 0), (1, 0)), constant_values=True)  # all see the root
        positions = jnp.broadcast_to(context.length[:, None] - 1 + depth, tokens.shape)
        output, block = apply(params, tokens, positions, mask, cache, block)
        return output.logits, block

    root = trees.root(context)
    nothing_below = jnp.zeros((*root.shape, 0), bool)
    logits, block = expand(None, root, root, nothing_below, 0)
    return build.grow(expand, rng_keys, context, logits[:, 0], block)


def self_speculation(
    apply: Callable, weights: Callable, view: Callable, build: Builder, vocab_size: int
) -> Drafter:
    """A drafter that needs no state.

    Args:
        apply: a `Model.apply`.
        weights: (Params) -> its weights.
        view: (Cache) -> what it reads of the target's.
        build: the tree.
        vocab_size: the target's.
    """

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        cache = view(context.cache)
        return grow_from_root(apply, weights(params), cache, build, rng_keys, context), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    return Drafter(init, propose, observe, build.proposal, vocab_size)
