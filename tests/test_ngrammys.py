"""N-Grammys: a batch of context n-grams and bigrams."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from texts import Text, Tokens, context_of, drafts_exactly, proposing, random_texts, strings_of

from specjax import testing
from specjax.drafters.ngrammys import bigrams, ngrammys
from specjax.laboratory import Pair, Parts
from specjax.models.tabular import tabular
from specjax.models.transformer import forward
from specjax.types import (
    Drafter,
    Params,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection


def expected_paths(
    text: Text, table: np.ndarray, longest: int, num_matches: int, d: int
) -> list[Tokens]:
    """Continuations by context, frequency and age, then bigrams; each but once."""
    matches = []
    for start in range(1, len(text)):
        m = max(m for m in range(longest + 1) if text[start - m : start] == text[len(text) - m :])
        m = min(m, start)
        copy = tuple(text[start + i % (len(text) - start)] for i in range(d))
        if m:
            matches.append((m, start, copy))
    seen = sorted(matches, reverse=True)[:num_matches]
    count = Counter((m, copy) for m, _, copy in seen)
    seen.sort(key=lambda match: (match[0], count[match[0], match[2]], match[1]), reverse=True)
    paths = [copy for _, _, copy in seen]
    for token in table[text[-1]].tolist():
        path = [token]
        while len(path) < d:
            path.append(int(table[path[-1], 0]))
        paths.append(tuple(path))
    return list(dict.fromkeys(paths))


def nodes_of(paths: Sequence[Tokens], budget: int) -> list[Tokens]:
    """The first nodes of a trie that is built path by path."""
    beginnings = (path[: i + 1] for path in paths for i in range(len(path)))
    return list(dict.fromkeys(beginnings))[:budget]


TABLE = np.array([[1, 5], [0, 2], [3, 0], [3, 1], [4, 2], [2, 5]], np.int32)
# After 1 2 came 3 3 twice, 4 4 once; after another 2 came 5 5 and, the latest match, 4 1.
BY_HAND = [1, 2, 3, 3, 1, 2, 4, 4, 1, 2, 3, 3, 0, 2, 5, 5, 0, 2, 4, 1, 2]


@pytest.mark.parametrize(
    ("num_paths", "num_matches", "expected"),
    [
        (2, 8, [(3,), (3, 3), (4,), (4, 4)]),
        # What a shared beginning saves is drafted too.
        (3, 8, [(3,), (3, 3), (4,), (4, 4), (4, 1), (5,)]),
        # The bigrams of 2: 3 3 is there already, 0 1 is not; two places are left over.
        (5, 8, [(3,), (3, 3), (4,), (4, 4), (4, 1), (5,), (5, 5), (0,), (0, 1)]),
        # Of two matches, the latest of the longest, neither is more frequent: the later one leads.
        (3, 2, [(3,), (3, 3), (4,), (4, 4), (0,), (0, 1)]),
    ],
)
def test_ngrammys_by_hand(num_paths: int, num_matches: int, expected: list[Tokens]) -> None:
    drafter = ngrammys(tabular(6), num_paths, 2, 2, num_matches, num_bigrams=2)
    assert drafter.proposal == ("point", 1 + 2 * num_paths, 2)
    draft = proposing(drafter)(TABLE, context_of([BY_HAND], 30))
    assert draft.tokens.shape == (1, 1 + 2 * num_paths)
    assert draft.tokens[0, 0] == 2
    assert strings_of(draft, 0) == expected


@pytest.mark.parametrize(("longest", "num_matches"), [(3, 6), (2, 30), (1, 1)])
def test_ngrammys_fills_the_batch_in_the_papers_order(longest: int, num_matches: int) -> None:
    """A few matches of many, and more than there are places."""
    num_paths, d = 4, 3
    texts = random_texts(longest, 80, 18)
    table = np.random.default_rng(0).permuted(np.tile(np.arange(6, dtype=np.int32), (6, 1)), axis=1)
    table = table[:, : 6 if num_matches == 1 else 3]
    drafter = ngrammys(tabular(6), num_paths, d, longest, num_matches, table.shape[1])
    draft = proposing(drafter)(table, context_of(texts, 20))
    fillers = set()
    for row, text in enumerate(texts):
        paths = expected_paths(text, table, longest, num_matches, d)
        assert strings_of(draft, row) == nodes_of(paths, num_paths * d)
        fillers.add(int(draft.num_drafted[row]) < num_paths * d)
    assert fillers == {num_matches > 1, False}


def test_a_batch_of_bigrams_alone() -> None:
    """With nothing to copy; tokens that the table should not hold become some that exist."""
    table = np.array([[1, 2], [9, 0], [-4, 1]], np.int32)
    drafter = ngrammys(tabular(3), 2, 3, num_matches=3)
    draft = proposing(drafter)(table, context_of([[0], [0, 1], [2, 1, 0]], 4))
    starts = [(1,), (1, 2), (1, 2, 0), (2,), (2, 0), (2, 0, 1)]
    assert strings_of(draft, 0) == starts
    assert strings_of(draft, 1)[:3] == [(2,), (2, 0), (2, 0, 1)]
    assert strings_of(draft, 2) == starts


@pytest.mark.parametrize("batch", [3, 256])
def test_bigrams_are_what_a_table_names(batch: int) -> None:
    """V = 7 is no multiple of 3; before a text comes token 0."""
    params = jax.random.normal(jax.random.key(0), (7, 7, 7))
    found = bigrams(tabular(7), params, 4, batch=batch)
    np.testing.assert_array_equal(found, np.argsort(-np.asarray(params[0]), -1)[:, :4])
    assert found.dtype == jnp.int32


@pytest.mark.slow
def test_bigrams_are_what_a_transformer_names() -> None:
    target, params = testing.tiny_model(7)
    logits = np.asarray(forward(target, params, jnp.arange(7)[:, None]).logits)[:, 0]
    expected = np.argsort(-logits, -1)[:, :7]
    np.testing.assert_array_equal(bigrams(target, params, 7, batch=3), expected)


@pytest.mark.parametrize("rule", [match, rejection])
@pytest.mark.slow
def test_drafts_are_exact(rule: Callable[[], Verifier]) -> None:
    def factory(pair: Pair) -> Parts:
        drafter = ngrammys(pair.target, 2, 2, ngram=2, num_matches=2)
        return Parts(drafter, bigrams(pair.target, pair.target_params, 2), rule())

    drafts_exactly(factory)


V3 = tabular(3)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no path": (lambda: ngrammys(V3, 0, 2), "num_paths=0.* all must be at least 1"),
    "an empty path": (lambda: ngrammys(V3, 2, 0), "num_tokens=0.* all must be at least 1"),
    "no n-gram": (lambda: ngrammys(V3, 2, 2, ngram=0), "ngram=0.* all must be at least 1"),
    "no match": (lambda: ngrammys(V3, 2, 2, num_matches=0), "num_matches=0.* at least 1"),
    "no bigram": (lambda: ngrammys(V3, 2, 2, num_bigrams=0), "num_bigrams=0.* at least 1"),
    "too many paths": (
        lambda: ngrammys(V3, 4, 2, num_matches=2, num_bigrams=1),
        "4 paths but 2 matches and 1 bigrams make 3 at most",
    ),
    "too many bigrams": (lambda: ngrammys(V3, 4, 2), "4 paths with bigrams but .* has 3 tokens"),
    "another table": (
        lambda: drafted(ngrammys(V3, 2, 2), jnp.zeros((3, 3), jnp.int32)),
        r"has shape \(3, 3\); ngrammys needs \(3, 2\)",
    ),
    "no table": (
        lambda: drafted(ngrammys(V3, 2, 2), ()),
        r"has shape \(0,\); ngrammys needs \(3, 2\)",
    ),
    "more successors than tokens": (
        lambda: bigrams(V3, jnp.zeros((3, 3, 3)), 4),
        "The 4 largest of 3 entries",
    ),
}


def drafted(drafter: Drafter, weights: Any) -> None:
    drafter.propose(Params((), weights), None, (), context_of([[1, 0]], 4))


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    refused(*REFUSALS[name])
