"""Texts to draft from, and drafts told as what they spell."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import exactness
from specjax.laboratory import Factory, tabular_pair
from specjax.sampling import sampling
from specjax.types import Cache, Context, Draft, Drafter, Params

Text = Sequence[int]
Tokens = tuple[int, ...]
SLOTS = 16


def random_texts(seed: int, count: int, longest: int, vocab_size: int = 3) -> list[list[int]]:
    """Of one token at least."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


DOCUMENTS = [*random_texts(1, 12, 12), [0, 0, 0, 0, 0], [2]]


def following(documents: Sequence[Text], end: Text) -> list[Tokens]:
    """Whatever follows a text in documents, to their ends."""
    m = len(end)
    return [
        tuple(document[i:])
        for document in documents
        for i in range(m, len(document))
        if list(document[i - m : i]) == list(end)
    ]


def context_of(texts: Sequence[Text], slots: int = SLOTS) -> Context:
    """Histories with garbage behind them."""
    tokens = np.random.default_rng(7).integers(0, 3, (len(texts), slots)).astype(np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    length = jnp.asarray([len(text) for text in texts], jnp.int32)
    cache = Cache((), (), length - 1)
    return Context(jnp.asarray(tokens), length, length, cache, sampling(len(texts)))


def proposing(drafter: Drafter) -> Callable[..., Draft]:
    """(the drafter's weights, context, state) -> its draft, of a drafter that draws nothing."""

    @jax.jit
    def propose(weights: Any, context: Context, state: Any = ()) -> Draft:
        return drafter.propose(Params((), weights), None, state, context)[0]

    return propose


def strings_of(draft: Draft, row: int) -> list[Tokens]:
    """What each drafted node spells, the root left out. Fillers, last, are the root's token."""
    tokens, parents = np.asarray(draft.tokens[row]), np.asarray(draft.parents[row])
    count = 1 + int(draft.num_drafted[row])
    found: list[Tokens] = [()]
    for i in range(1, count):
        assert 0 <= parents[i] < i
        found.append((*found[parents[i]], int(tokens[i])))
    assert (tokens[count:] == tokens[0]).all()
    return found[1:]


def drafts_exactly(factory: Factory) -> None:
    """By enumeration, after a text in which things repeat."""
    check = exactness.enumeration(factory, tabular_pair(3), prompt=(1, 0, 2, 1, 0))
    assert check.passed, check.verdict
    assert 1.01 < check.figures["expected_tokens"][0] < 2.99, "some are kept, some are not"
    jax.clear_caches()
