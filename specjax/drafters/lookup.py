"""Prompt lookup: what followed the last few tokens the last time they occurred.

Saxena, *Prompt lookup decoding*, 2023. Of all earlier places where the newest tokens end, the one
that agrees on most of them (up to `ngram`) wins, then the latest; what followed there is copied. A
copy that runs into the present goes on copying itself, which continues a repetition.
"""

from typing import Any

import jax.numpy as jnp

from specjax import trees
from specjax.types import Array, Context, Draft, Drafter, Keys, Outcome, Params, Proposal


def longest_match(tokens: Array, length: Array, ngram: int) -> tuple[Array, Array]:
    """The best earlier occurrence of each row's suffix.

    Args:
        tokens: [B, S] history.
        length: [B].
        ngram: how many of the newest tokens are compared at most.

    Returns:
        Where its continuation starts [B], in 1 to length - 1 if there is any, and how many tokens
        agree [B], 0 if there is none.
    """
    slot = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    agree = jnp.zeros(tokens.shape, jnp.int32)  # with the tokens just before each slot
    unbroken = (slot < length[:, None]) & (slot > 0)
    for back in range(1, ngram + 1):
        newest = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0)[:, None], 1)
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        unbroken &= (earlier == newest) & (slot >= back) & (length[:, None] >= back)
        agree += unbroken
    best = jnp.argmax(agree * tokens.shape[1] + slot * (agree > 0), 1).astype(jnp.int32)
    return best, jnp.take_along_axis(agree, best[:, None], 1)[:, 0]


def lookup(num_tokens: int, ngram: int = 3) -> Drafter:
    """Copies `num_tokens` tokens from the longest, latest match of at most `ngram` tokens.

    Raises:
        ValueError: fewer than one token or n-gram.
    """
    if num_tokens < 1 or ngram < 1:
        raise ValueError(
            f"lookup(num_tokens={num_tokens}, ngram={ngram}) has nothing to copy; "
            "both must be at least 1."
        )

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del params, rng_keys
        start, agree = longest_match(context.tokens, context.length, ngram)
        found = agree > 0
        period = jnp.where(found, context.length - start, 1)[:, None]
        first = jnp.where(found, start, context.length - 1)[:, None]
        source = first + jnp.arange(num_tokens, dtype=jnp.int32) % period
        guess = jnp.take_along_axis(context.tokens, source, 1)
        tokens = jnp.concatenate([trees.root(context), guess], 1)
        return trees.chain(tokens, num_drafted=jnp.where(found, num_tokens, 0)), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    return Drafter(init, propose, observe, Proposal("point", num_tokens + 1, num_tokens))
