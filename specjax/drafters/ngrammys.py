"""A batch of guesses that cost nothing: what followed here before, then the model's own bigrams.

The N-Grammys, Stewart et al., arXiv 2411.03786. First come the distinct continuations of the
newest tokens in the text so far, those of the longest context first, of one context the most
frequent. What they leave of the batch goes to extended bigrams: the j-th of them starts with the
j-th likeliest successor of the root, and on goes the likeliest successor of each token. The paper
verifies rows of a batch; here equal beginnings are one node, and what that saves is drafted too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import trees
from specjax.drafters.lookup import best_matches
from specjax.drafters.trie import common_beginnings, trie
from specjax.kernels.agreement import agreement
from specjax.kernels.vocabulary import largest
from specjax.types import (
    Array,
    Context,
    Draft,
    Drafter,
    Keys,
    Model,
    Outcome,
    Params,
    Proposal,
    PyTree,
)


def ngrammys(
    target: Model,
    num_paths: int,
    num_tokens: int,
    ngram: int = 3,
    num_matches: int = 16,
    num_bigrams: int | None = None,
) -> Drafter:
    """Drafts with `params.drafter`, the table of `bigrams`, in 1 + `num_paths` `num_tokens` nodes.

    Args:
        target: the decoder's.
        num_paths: continuations of a batch.
        num_tokens: D, of a continuation. One that runs into the present goes on copying itself.
        ngram: newest tokens that are looked for at most.
        num_matches: earlier places that are looked at: those where most of the newest tokens stand,
            then the latest.
        num_bigrams: columns of the table, paths that may start with a bigram; by default as many as
            there are paths.

    Raises:
        ValueError: nothing to draft or to draft it from, more paths than matches and bigrams make,
            more bigrams than there are tokens.
    """
    width = num_paths if num_bigrams is None else num_bigrams
    least = min(num_paths, num_tokens, ngram, num_matches, width)
    if least < 1:
        raise ValueError(
            f"ngrammys(num_paths={num_paths}, num_tokens={num_tokens}, ngram={ngram}, "
            f"num_matches={num_matches}, num_bigrams={width}) has nothing to draft; all must be at "
            "least 1."
        )
    if num_paths > num_matches + width:
        raise ValueError(
            f"ngrammys drafts {num_paths} paths but {num_matches} matches and {width} bigrams make "
            f"{num_matches + width} at most; ask for fewer."
        )
    if width > target.vocab_size:
        raise ValueError(
            f"ngrammys starts {width} paths with bigrams but the target has {target.vocab_size} "
            "tokens; ask for fewer."
        )
    num_nodes = 1 + num_paths * num_tokens

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del rng_keys
        table = params.drafter
        if np.shape(table) != (target.vocab_size, width):
            raise ValueError(
                f"The table of bigrams has shape {np.shape(table)}; ngrammys needs "
                f"{(target.vocab_size, width)}."
            )
        root = trees.root(context)
        copied, agree = continuations(context, ngram, num_matches, num_tokens)
        tokens = jnp.concatenate([copied, extended(table, root[:, 0], num_tokens)], 1)
        is_there = jnp.pad(agree > 0, ((0, 0), (0, width)), constant_values=True)
        common = common_beginnings(tokens, jnp.where(is_there, num_tokens, 0))
        same = common[..., None] > np.arange(num_tokens)
        value = jnp.concatenate(
            [ranked(same[..., -1], agree) + width, _bigram_values(agree, width)], 1
        )
        # A string is worth its best continuation, so that no string surpasses its beginnings.
        values = jnp.where(same, value[:, None, :, None], 0.0).max(2)
        budget = jnp.full_like(context.length, num_nodes - 1)
        return trie(root, tokens, common, values, num_nodes, budget), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    proposal = Proposal("point", num_nodes, num_tokens)
    return Drafter(init, propose, observe, proposal, target.vocab_size)


def continuations(
    context: Context, ngram: int, num_matches: int, num_tokens: int
) -> tuple[Array, Array]:
    """What followed the newest tokens [B, K, D], and how many of them stood there [B, K].

    The longest contexts first, of equals the latest; 0 stood where there is no further match.
    """
    tokens, length = context.tokens, context.length[:, None]
    start, agree = best_matches(agreement(tokens, context.length, ngram), num_matches)
    start = jnp.where(agree > 0, start, length - 1)
    ahead = jnp.arange(num_tokens, dtype=jnp.int32) % (length - start)[..., None]
    place = (start[..., None] + ahead).reshape(len(tokens), -1)
    found = jnp.take_along_axis(tokens, place, 1)
    return found.reshape(-1, num_matches, num_tokens), agree


def ranked(same: Array, agree: Array) -> Array:
    """Values of continuations [B, K] that put longer contexts, then frequent ones, then late first.

    Args:
        same: [B, C, C], which of the K continuations and of others behind them are equal.
        agree: [B, K] int32, falling, 0 where there is none.
    """
    k = agree.shape[1]
    equal = same[:, :k, :k] & (agree[:, :, None] == agree[:, None])
    frequency = equal.sum(-1, dtype=jnp.int32)
    place = jnp.arange(k, 0, -1, dtype=jnp.int32)
    return ((agree * (k + 1) + frequency) * k + place).astype(jnp.float32)


def extended(table: Array, root: Array, num_tokens: int) -> Array:
    """The paths [B, k, D] of bigrams that follow the roots [B], the likeliest start first."""
    last = table.shape[0] - 1
    token = table[root]
    path = [token]
    for _ in range(num_tokens - 1):
        # A table need not be one of tokens; a guess has to be one.
        token = table[jnp.clip(token, 0, last), 0]
        path.append(token)
    return jnp.clip(jnp.stack(path, -1), 0, last)


def _bigram_values(agree: Array, width: int) -> Array:
    value = jnp.arange(width, 0, -1, dtype=jnp.float32)
    return jnp.broadcast_to(value, (agree.shape[0], width))


@functools.partial(jax.jit, static_argnames=("target", "k", "batch"))
def bigrams(target: Model, params: PyTree, k: int, batch: int = 256) -> Array:
    """The likeliest successors of every token by the model itself, which sees that token alone.

    Args:
        target: the model.
        params: its weights.
        k: how many successors, the likeliest first.
        batch: tokens of one pass.

    Returns:
        [V, k] int32.
    """
    v = target.vocab_size
    batch = min(batch, v)
    every = jnp.arange(-(-v // batch) * batch, dtype=jnp.int32) % v

    def successors(tokens: Array) -> Array:
        tokens = tokens[:, None]
        mask = jnp.ones((batch, 1, 1), bool)
        cache = target.init_cache(batch, 1)
        output, _ = target.apply(params, tokens, jnp.zeros_like(tokens), mask, cache)
        return largest(output.logits[:, 0], k)

    return lax.map(successors, every.reshape(-1, batch)).reshape(-1, k)[:v]
