"""Retrieval: what followed the newest tokens in a corpus, as a tree.

REST, He et al., arXiv 2311.08252. The longest of the row's suffixes that a document holds is looked
up, its continuations are joined to a trie, and the strings that most of them begin with stay.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax import trees
from specjax.drafters import corpus as corpora
from specjax.drafters.trie import common_beginnings, frequencies, trie
from specjax.types import Context, Draft, Drafter, Keys, Outcome, Params, Proposal


def retrieval(
    num_nodes: int,
    num_tokens: int,
    longest: int = 16,
    shortest: int = 2,
    num_matches: int = 32,
    vocab_size: int | None = None,
) -> Drafter:
    """Drafts from the documents of `params.drafter`, a `Corpus`; fillers where nothing matches.

    Args:
        num_nodes: N of the tree, its root included.
        num_tokens: D, of a continuation.
        longest: newest tokens that are searched for first.
        shortest: newest tokens that are searched for last.
        num_matches: K, continuations that are looked at; of more matches as many at equal
            distances in the sorted corpus.
        vocab_size: V of the corpus, compared with the target's by `decoder`; None leaves it to the
            first step.

    Raises:
        ValueError: sizes that contradict each other.
    """
    name = f"retrieval(num_nodes={num_nodes}, num_tokens={num_tokens})"
    check(name, num_nodes, num_tokens, shortest, longest, num_matches)
    sizes = np.arange(longest, shortest - 1, -1, dtype=np.int32)

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del rng_keys
        first, count = corpora.ranges(params.drafter, context.tokens, context.length, sizes)
        best = jnp.argmax(count > 0, 1)[:, None]  # the longest
        first, count = (jnp.take_along_axis(x, best, 1)[:, 0] for x in (first, count))
        size = jnp.asarray(sizes)[best[:, 0]]
        tokens, length = corpora.continuations(
            params.drafter, first, count, size, num_matches, num_tokens
        )
        common = common_beginnings(tokens, length)
        frequency = frequencies(common, num_tokens).astype(jnp.float32)
        budget = jnp.full_like(count, num_nodes - 1)
        root = trees.root(context)
        return trie(root, tokens, common, frequency, num_nodes, budget), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del context
        corpora.expect("retrieval", params.drafter, outcome.output.logits.shape[-1])
        return state

    return Drafter(
        init, propose, observe, Proposal("point", num_nodes, num_tokens), vocab_size=vocab_size
    )


def check(
    name: str, num_nodes: int, num_tokens: int, shortest: int, longest: int, num_matches: int
) -> None:
    """Refuses sizes of a trie of continuations that contradict each other.

    Raises:
        ValueError: they do.
    """
    least = min(num_tokens, shortest, num_matches)
    if least < 1:
        raise ValueError(
            f"{name} has shortest {shortest} and {num_matches} matches, the least of all {least}; "
            "each must be at least 1."
        )
    if shortest > longest:
        raise ValueError(
            f"{name} searches for {shortest} to {longest} tokens; "
            "the shortest match may not exceed the longest."
        )
    if longest > corpora.LONGEST:
        raise ValueError(
            f"{name} searches for {longest} tokens but a corpus is sorted for matches of "
            f"{corpora.LONGEST}; search for fewer."
        )
    if num_nodes <= num_tokens + 1:
        raise ValueError(
            f"{name} has {num_nodes} nodes but a chain of {num_tokens} tokens has "
            f"{num_tokens + 1}; a tree needs more."
        )
    if num_nodes > 1 + num_matches * num_tokens:
        raise ValueError(
            f"{name} has {num_nodes} nodes but {num_matches} matches of {num_tokens} tokens give "
            f"{1 + num_matches * num_tokens} at most; ask for fewer."
        )
