"""Prompt lookup: what followed the last few tokens the last time they occurred.

Saxena, *Prompt lookup decoding*, 2023. Of all earlier places where the newest tokens end, the one
that agrees on most of them (up to `ngram`) wins, then the latest; what followed there is copied. A
copy that runs into the present goes on copying itself, which continues a repetition.

LLMA, Yang et al., arXiv 2304.04487, copies from reference documents, too: `reference`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax import trees
from specjax.drafters import corpus as corpora
from specjax.kernels.agreement import agreement
from specjax.kernels.vocabulary import largest
from specjax.types import Array, Context, Draft, Drafter, Keys, Outcome, Params, Proposal


def best_matches(agree: Array, count: int) -> tuple[Array, Array]:
    """The slots where most tokens agree, of equals the latest.

    Args:
        agree: [B, S] int32, of `agreement`.
        count: K, how many slots. Those that agree on none fill up what is left.

    Returns:
        The slots [B, K] and how many tokens agree there [B, K].
    """
    agree = jnp.pad(agree, ((0, 0), (0, max(count - agree.shape[1], 0))))
    key = agree * agree.shape[1] + jnp.arange(agree.shape[1], dtype=jnp.int32)
    # In float32, exact below 2 ** 24: XLA on CPU sorts integers to find the largest.
    slots = largest(key.astype(jnp.float32), count)
    return slots, jnp.take_along_axis(agree, slots, 1)


def lookup(num_tokens: int, ngram: int = 3, min_ngram: int = 1) -> Drafter:
    """Copies `num_tokens` tokens from the longest, latest match of at most `ngram` tokens.

    Where fewer than `min_ngram` tokens agree, all nodes are fillers.

    Raises:
        ValueError: fewer than one token or n-gram, a least n-gram above the largest.
    """
    _check(f"lookup(num_tokens={num_tokens}, ngram={ngram})", num_tokens, ngram, min_ngram)

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del params, rng_keys
        guess, agree = _copied(context, num_tokens, ngram)
        tokens = jnp.concatenate([trees.root(context), guess], 1)
        num_drafted = jnp.where(agree >= min_ngram, num_tokens, 0)
        return trees.chain(tokens, num_drafted=num_drafted), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    return Drafter(_init, propose, observe, Proposal("point", num_tokens + 1, num_tokens))


def reference(
    num_tokens: int, ngram: int = 3, min_ngram: int = 1, vocab_size: int | None = None
) -> Drafter:
    """Copies from the longest match in the row's own text or in documents, of equals from the text.

    The documents are `params.drafter`, a `Corpus`. The latest match in the row's text is copied as
    `lookup` does; of several in documents the one in the middle of their order, up to the
    document's end.

    Args:
        num_tokens: D, copied.
        ngram: how many of the newest tokens are compared at most.
        min_ngram: how many of them have to agree.
        vocab_size: V of the corpus, compared with the target's by `decoder`; None leaves it to the
            first step.

    Raises:
        ValueError: fewer than one token or n-gram, a least n-gram above the largest, more tokens
            than a corpus is sorted for.
    """
    name = f"reference(num_tokens={num_tokens}, ngram={ngram})"
    _check(name, num_tokens, ngram, min_ngram)
    if ngram > corpora.LONGEST:
        raise ValueError(
            f"{name} compares {ngram} tokens but a corpus is sorted for matches of "
            f"{corpora.LONGEST}; compare fewer."
        )
    sizes = np.arange(ngram, min_ngram - 1, -1, dtype=np.int32)

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del rng_keys
        guess, agree = _copied(context, num_tokens, ngram)
        agree = jnp.where(agree >= min_ngram, agree, 0)
        first, count = corpora.ranges(params.drafter, context.tokens, context.length, sizes)
        best = jnp.argmax(count > 0, 1)[:, None]  # the longest
        first, count = (jnp.take_along_axis(x, best, 1)[:, 0] for x in (first, count))
        size = jnp.asarray(sizes)[best[:, 0]]
        there, length = corpora.continuations(params.drafter, first, count, size, 1, num_tokens)
        there, length = there[:, 0], length[:, 0]
        is_longer = (count > 0) & (size > agree)
        root = trees.root(context)
        there = jnp.where(jnp.arange(num_tokens) < length[:, None], there, root)
        tokens = jnp.concatenate([root, jnp.where(is_longer[:, None], there, guess)], 1)
        num_drafted = jnp.where(is_longer, length, jnp.where(agree > 0, num_tokens, 0))
        return trees.chain(tokens, num_drafted=num_drafted), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del context
        corpora.expect("reference", params.drafter, outcome.output.logits.shape[-1])
        return state

    proposal = Proposal("point", num_tokens + 1, num_tokens)
    return Drafter(_init, propose, observe, proposal, vocab_size=vocab_size)


def _init(batch_size: int, max_length: int) -> tuple:
    del batch_size, max_length
    return ()


def _copied(context: Context, num_tokens: int, ngram: int) -> tuple[Array, Array]:
    """What followed the row's latest longest match [B, D], and how many tokens agree [B]."""
    slots, counts = best_matches(agreement(context.tokens, context.length, ngram), 1)
    start, agree = slots[:, 0], counts[:, 0]
    found = agree > 0
    period = jnp.where(found, context.length - start, 1)[:, None]
    first = jnp.where(found, start, context.length - 1)[:, None]
    source = first + jnp.arange(num_tokens, dtype=jnp.int32) % period
    return jnp.take_along_axis(context.tokens, source, 1), agree


def _check(name: str, num_tokens: int, ngram: int, min_ngram: int) -> None:
    if num_tokens < 1 or ngram < 1:
        raise ValueError(f"{name} has nothing to copy; both must be at least 1.")
    if not 1 <= min_ngram <= ngram:
        raise ValueError(f"{name} needs {min_ngram} tokens to agree; need 1 to {ngram}.")
