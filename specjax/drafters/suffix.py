"""Suffix decoding: what usually followed the newest tokens, here and in past outputs.

SuffixDecoding, Oliaro et al., arXiv 2411.04975. For every length p of a match there are two tries
of what followed, one of this text and one of a corpus. With count(N) the continuations that begin
with a node's string,

    C(N) = count(N) / sum of count over N and its siblings,   D(N) = product of C along N's path,

the best nodes by D are drafted, at most `factor` p of them, of the trie for which they add up to
most: the expected number of accepted tokens, if the past repeats itself.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import trees
from specjax.drafters import corpus as corpora
from specjax.drafters.lookup import best_matches
from specjax.drafters.retrieval import check
from specjax.drafters.trie import common_beginnings, eldest, frequencies, trie
from specjax.kernels.agreement import agreement
from specjax.types import Array, Context, Draft, Drafter, Keys, Outcome, Params, Proposal


def suffix(
    num_nodes: int,
    num_tokens: int,
    longest: int = 16,
    factor: float = 4.0,
    num_matches: int = 8,
    vocab_size: int | None = None,
) -> Drafter:
    """Drafts from the row's own text and from `params.drafter`, a `Corpus` of past outputs.

    The corpus may be `corpus.empty`; between calls `corpus.updated` adds what was written. Of equal
    sums the longer match wins, then the row's own text. Without a match all nodes are fillers.

    Args:
        num_nodes: N of the tree, its root included.
        num_tokens: D, of a continuation.
        longest: p is 1 to this.
        factor: nodes drafted at most per token of the match.
        num_matches: K, continuations that a trie is made of at most. Of the row's own matches those
            that agree on most tokens (up to `longest`), then the latest; of a corpus's as many at
            equal distances in its order.
        vocab_size: V of the corpus, compared with the target's by `decoder`; None leaves it to the
            first step.

    Raises:
        ValueError: sizes that contradict each other.
    """
    name = f"suffix(num_nodes={num_nodes}, num_tokens={num_tokens})"
    check(name, num_nodes, num_tokens, 1, longest, num_matches)
    sizes = np.arange(longest, 0, -1, dtype=np.int32)  # P of them
    if not 0 < factor < math.inf:
        raise ValueError(f"{name} drafts {factor} nodes per token; need a number above 0.")
    budgets = np.array([math.floor(factor * p) for p in sizes.tolist()], np.int32)
    if num_nodes > 1 + budgets[0]:
        raise ValueError(
            f"{name} has {num_nodes} nodes but a match of {longest} tokens with factor {factor} "
            f"gives {1 + budgets[0]} at most; ask for fewer."
        )
    # Tries in the order in which ties are broken: P matches, the longest first, of two sources.
    budgets = np.minimum(np.repeat(budgets, 2), num_nodes - 1)

    def own(context: Context) -> tuple[Array, Array]:
        """Continuations [B, P, K, D] in the row's own text, and their lengths."""
        tokens, length = context.tokens, context.length[:, None]
        start, agree = best_matches(agreement(tokens, context.length, longest), num_matches)
        depth = jnp.arange(num_tokens, dtype=jnp.int32)
        place = (start[..., None] + depth).reshape(len(tokens), -1)
        found = jnp.take_along_axis(tokens, jnp.minimum(place, tokens.shape[1] - 1), 1)
        found = found.reshape(-1, 1, num_matches, num_tokens)
        left = jnp.minimum(length - start, num_tokens)[:, None]
        matches = agree[:, None] >= sizes[:, None]
        shape = (len(tokens), longest, num_matches, num_tokens)
        return jnp.broadcast_to(found, shape), jnp.where(matches, left, 0)

    def past(corpus: corpora.Corpus, context: Context) -> tuple[Array, Array]:
        """The same in the corpus."""
        first, count = corpora.ranges(corpus, context.tokens, context.length, sizes)
        size = jnp.broadcast_to(sizes, count.shape)
        return corpora.continuations(corpus, first, count, size, num_matches, num_tokens)

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del rng_keys
        sources = zip(own(context), past(params.drafter, context), strict=True)
        # [B, 2P, K, D] and [B, 2P, K]
        tokens, length = (
            jnp.stack(x, 2).reshape(len(context.length), -1, *x[0].shape[2:]) for x in sources
        )
        common = common_beginnings(tokens, length)
        value = path_values(common, length, num_tokens)
        best = jnp.argmax(score(common, value, budgets), 1)

        def row(x: Array) -> Array:
            return jnp.take_along_axis(x, best.reshape(-1, *[1] * (x.ndim - 1)), 1)[:, 0]

        budget = jnp.asarray(budgets)[best]
        root = trees.root(context)
        return trie(root, row(tokens), row(common), row(value), num_nodes, budget), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del context
        corpora.expect("suffix", params.drafter, outcome.output.logits.shape[-1])
        return state

    return Drafter(
        init, propose, observe, Proposal("point", num_nodes, num_tokens), vocab_size=vocab_size
    )


def path_values(common: Array, length: Array, depth: int) -> Array:
    """D of the string that each continuation has at each depth.

    Args:
        common: [..., K, K], of `common_beginnings`.
        length: [..., K].
        depth: D of the continuations.

    Returns:
        [..., K, D] float32; 0 beyond a continuation's length.
    """
    place = jnp.arange(depth)
    goes_on = place < length[..., None, :, None]  # [..., 1, K, D]
    siblings = ((common[..., None] >= place) & goes_on).sum(-2)
    share = frequencies(common, depth) / jnp.maximum(siblings, 1).astype(jnp.float32)
    # One after another: rounding must not lift a node above its parent.
    path = [share[..., 0]]
    for d in range(1, depth):
        path.append(path[-1] * share[..., d])
    return jnp.stack(path, -1)


def score(common: Array, value: Array, budgets: np.ndarray) -> Array:
    """The sum of D over the best nodes of each trie, as many as its budget: [..., R].

    Args:
        common: [..., R, K, K], of `common_beginnings`.
        value: [..., R, K, D], of `path_values`.
        budgets: [R].
    """
    k, d = value.shape[-2:]
    nodes = jnp.where(eldest(common, d)[1], value, 0.0).reshape(*value.shape[:-2], k * d)
    best, _ = lax.top_k(nodes, int(budgets.max()))
    return jnp.where(np.arange(budgets.max()) < budgets[:, None], best, 0.0).sum(-1)
