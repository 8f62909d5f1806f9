"""Drafts out of texts: copies, and tries of what followed."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from refusals import refused
from texts import (
    DOCUMENTS,
    SLOTS,
    Text,
    Tokens,
    context_of,
    following,
    proposing,
    random_texts,
    strings_of,
)

from specjax import engine, exactness
from specjax.drafters import corpus as corpora
from specjax.drafters.corpus import LONGEST, corpus
from specjax.drafters.lookup import lookup, reference
from specjax.drafters.retrieval import retrieval
from specjax.drafters.suffix import suffix
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.sampling import sampling
from specjax.types import Draft, Drafter, Params, Verifier
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection


def copied(draft: Draft, row: int) -> list[int]:
    """The tokens of a chain, without its root and its fillers."""
    return np.asarray(draft.tokens[row, 1 : 1 + int(draft.num_drafted[row])]).tolist()


# -------------------------------------------------------------------------------- lookup, reference


def test_lookup_prefers_agreement_then_the_latest() -> None:
    texts = [
        [1, 2, 0, 0, 2, 1, 1, 2],  # 1 2 before 2 alone
        [2, 0, 2, 1, 2],  # the latest 2
        [0, 1, 2, 0, 2, 1, 1, 2],
        [0, 1],  # nothing
    ]
    draft = proposing(lookup(2, ngram=3))(None, context_of(texts))
    assert [copied(draft, b) for b in range(4)] == [[0, 0], [1, 2], [0, 2], []]
    draft = proposing(lookup(2, ngram=3, min_ngram=2))(None, context_of(texts))
    assert [copied(draft, b) for b in range(4)] == [[0, 0], [], [0, 2], []]


def test_reference_copies_from_where_the_match_is_longer() -> None:
    documents = [np.array([4, 1, 2, 3, 3, 3, 3]), np.array([1, 0]), np.array([2, 4, 4, 0])]
    made = corpus(documents, 5)
    texts = [
        [4, 1, 2],  # three tokens, in documents only
        [1, 2, 0, 4, 1, 2],  # two in the text, three in a document
        [2, 3, 0, 1, 2, 0, 1, 2],  # three in the text
        [1, 3, 1],  # one in either: the text
        [3, 0],  # nothing follows it
        [0, 2, 4],  # to the document's end
    ]
    draft = proposing(reference(4))(made, context_of(texts))
    expected = [[3, 3, 3, 3], [3, 3, 3, 3], [0, 1, 2, 0], [3, 1, 3, 1], [], [4, 0]]
    assert [copied(draft, b) for b in range(6)] == expected
    draft = proposing(reference(4, ngram=3, min_ngram=2))(made, context_of(texts))
    expected[3] = []
    assert [copied(draft, b) for b in range(6)] == expected


# ---------------------------------------------------------------------------------------- retrieval


def test_retrieval_keeps_what_follows_most() -> None:
    documents = [
        *([0, 1, 2, 3],) * 3,
        *([0, 1, 2, 4],) * 2,
        *([0, 1, 4, 4],) * 2,
        [2, 0, 1, 3],
        [1, 0],
    ]
    made = corpus([np.array(x) for x in documents], 5)
    drafter = retrieval(5, 2, longest=3, shortest=1, num_matches=8)
    texts = [[4, 0, 1], [2, 0, 1], [1], [3], [0, 2]]
    draft = proposing(drafter)(made, context_of(texts))
    # After 0 1: 2 five times, 4 twice, 3 once; of two tokens 2 3 and then 2 4, 4 4. Depth first
    # among equals is what comes first.
    assert strings_of(draft, 0) == [(2,), (2, 3), (4,), (2, 4)]
    assert strings_of(draft, 1) == [(3,)]  # a longer match counts alone
    assert sorted(strings_of(draft, 2), key=len)[0] == (2,)
    assert strings_of(draft, 3) == []  # ends its documents
    assert np.asarray(draft.tokens[3]).tolist() == [3] * 5
    assert strings_of(draft, 4)[0] in ((0,), (3,))
    assert drafter.proposal == ("point", 5, 2)
    cautious = proposing(retrieval(5, 2, longest=3, shortest=2, num_matches=8))
    assert np.asarray(cautious(made, context_of(texts)).num_drafted).tolist() == [4, 1, 0, 0, 0]


# ------------------------------------------------------------------------------------------- suffix


def expected_tries(
    documents: Sequence[Text], text: Text, longest: int, d: int
) -> dict[tuple[str, int], dict[Tokens, float]]:
    """D of every string, of both sources and every length of a match."""
    tries = {}
    for p in range(1, min(longest, len(text)) + 1):
        for source, where in (("own", [text]), ("past", documents)):
            count = Counter(
                found[:depth]
                for found in following(where, text[-p:])
                for depth in range(1, min(d, len(found)) + 1)
            )
            value: dict[Tokens, float] = {(): 1.0}
            for string in sorted(count, key=len):
                above = string[:-1]
                siblings = sum(n for x, n in count.items() if x[:-1] == above)
                value[string] = value[above] * count[string] / siblings
            del value[()]
            tries[source, p] = value
    return tries


def test_suffix_drafts_the_best_trie() -> None:
    longest, d, n, factor = 4, 3, 7, 2.5
    drafter = suffix(n, d, longest=longest, factor=factor, num_matches=30)
    documents = DOCUMENTS[:6]
    made = corpus([np.array(x) for x in documents], 3)
    texts = random_texts(4, 80, SLOTS - 2)
    draft = proposing(drafter)(made, context_of(texts))
    winners: Counter[tuple[str, int]] = Counter()
    for b, text in enumerate(texts):
        tries = expected_tries(documents, text, longest, d)
        budget = {p: min(int(factor * p), n - 1) for p in range(1, longest + 1)}
        best = {
            (source, p): sorted(value.values(), reverse=True)[: budget[p]]
            for (source, p), value in tries.items()
        }
        most = max(map(sum, best.values()))
        drafted = strings_of(draft, b)
        assert len(set(drafted)) == len(drafted)
        if most == 0:
            assert drafted == []
            continue
        # Rounding may decide between sums that are equal.
        fitting = [
            key
            for key in best
            if sum(best[key]) > most - 1e-5
            and all(string in tries[key] for string in drafted)
            and np.allclose([tries[key][string] for string in drafted], best[key][: len(drafted)])
            and len(drafted) == len(best[key])
        ]
        assert fitting, (text, drafted)
        winners[fitting[0]] += 1
    assert {source for source, _ in winners} == {"own", "past"}
    assert {p for _, p in winners} >= {1, 2, 3, 4}


def test_suffix_prefers_the_longer_match_then_its_own_text() -> None:
    drafter = suffix(6, 3, longest=2, factor=3, num_matches=4)
    made = corpus([np.array([0, 1, 2, 2, 2]), np.array([1, 4, 4, 4])], 5)
    texts = [
        [0, 1, 3, 3, 3, 0, 1],  # three certain tokens in either source
        [1, 3, 3, 3, 0, 1],  # two tokens agree in documents, one in the text
    ]
    draft = proposing(drafter)(made, context_of(texts))
    assert strings_of(draft, 0) == [(3,), (3, 3), (3, 3, 3)]
    assert strings_of(draft, 1) == [(2,), (2, 2), (2, 2, 2)]


def test_a_row_has_more_matches_than_are_looked_at() -> None:
    """Those that agree on most stay, then the latest."""
    draft = proposing(suffix(4, 2, longest=2, factor=2, num_matches=2))
    text = [0, 1, 2, 1, 3, 1, 4, 1, 0, 0, 1]
    found = draft(corpora.empty(5, 4), context_of([text]))
    # Two tokens agree at 2, one at 3, 4 and 0; the match of one token sees 2 and 0, half each.
    assert strings_of(found, 0) == [(2,), (2, 1)]


def test_updates_compile_nothing() -> None:
    made = corpora.empty(3, 32, "made with this")
    draft = proposing(suffix(5, 2, longest=3))
    context = context_of([[0, 1]])
    assert draft(made, context).num_drafted[0] == 0
    made = corpora.updated(made, [np.array([2, 0, 1, 2, 2])])
    assert strings_of(draft(made, context), 0) == [(2,), (2, 2)]
    made = corpora.updated(made, [np.array([1, 0])] * 9)
    assert strings_of(draft(made, context), 0)[0] == (0,)
    assert draft._cache_size() == 1
    assert made.tokenizer == "made with this"


# -------------------------------------------------------------------------------------------- exact

EXACT: dict[str, Callable[[], Drafter]] = {
    "reference": lambda: reference(2, ngram=2),
    "retrieval": lambda: retrieval(5, 2, longest=2, shortest=1, num_matches=4),
    "suffix": lambda: suffix(5, 2, longest=2, factor=2, num_matches=4),
}


@pytest.mark.parametrize("verifier", [match, rejection])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.slow
def test_drafts_are_exact(name: str, verifier: Callable[[], Verifier]) -> None:
    def factory(pair: Pair) -> Parts:
        documents = [np.array(x) for x in random_texts(5, 3, 9)]
        return Parts(EXACT[name](), corpus(documents, pair.target.vocab_size), verifier())

    check = exactness.enumeration(factory, tabular_pair(3))
    assert check.passed, check.verdict
    assert check.figures["expected_tokens"][0] > 1.01
    jax.clear_caches()


# ----------------------------------------------------------------------------------------- refusals

REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no n-gram": (lambda: lookup(2, ngram=3, min_ngram=0), "needs 0 tokens to agree; need 1 to 3"),
    "n-grams crossed": (lambda: lookup(2, 3, 4), "ngram=3.* needs 4 tokens to agree; need 1 to 3"),
    "no tokens": (lambda: reference(0), "num_tokens=0.* both must be at least 1"),
    "too long": (
        lambda: reference(2, ngram=LONGEST + 1),
        f"compares {LONGEST + 1} tokens but a corpus is sorted for matches of {LONGEST};",
    ),
    "no match": (lambda: retrieval(9, 2, num_matches=0), "0 matches.* at least 1"),
    "shortest 0": (lambda: retrieval(9, 2, shortest=0), "shortest 0.* at least 1"),
    "no continuation": (lambda: retrieval(9, 0), "num_tokens=0.* at least 1"),
    "crossed": (lambda: retrieval(9, 2, longest=2, shortest=3), "for 3 to 2 tokens"),
    "long": (lambda: suffix(9, 2, longest=64), f"64 tokens but .* sorted .* of {LONGEST}"),
    "a chain": (lambda: retrieval(3, 2), "has 3 nodes but a chain of 2 tokens has 3"),
    "too many nodes": (
        lambda: retrieval(10, 2, num_matches=4),
        "10 nodes but 4 matches of 2 tokens give 9 at most",
    ),
    "a suffix's chain": (lambda: suffix(5, 4), "has 5 nodes but a chain of 4 tokens has 5"),
    "no factor": (lambda: suffix(9, 2, factor=0.0), "drafts 0.0 nodes per token"),
    "a small factor": (
        lambda: suffix(9, 2, longest=4, factor=1.5),
        "9 nodes but a match of 4 tokens with factor 1.5 gives 7 at most",
    ),
    "a vocabulary, at once": (
        lambda: engine.decoder(tabular_pair(3).target, retrieval(9, 2, vocab_size=4), match()),
        "vocabulary has 4 tokens and the target's 3",
    ),
    "a vocabulary, in a step": (
        lambda: prefilled(suffix(5, 2, longest=2), corpora.empty(4, 8)),
        "vocabulary of 4 tokens and the target one of 3",
    ),
    "no corpus": (
        lambda: prefilled(retrieval(5, 2), ()),
        "retrieval has a tuple .* needs a Corpus",
    ),
}


def prefilled(drafter: Drafter, weights: Any) -> None:
    pair = tabular_pair(3)
    decoder = engine.decoder(pair.target, drafter, match())
    engine.prefill(
        *(decoder, Params(pair.target_params, weights), jax.random.split(jax.random.key(0), 1)),
        *(sampling(1), np.ones((1, 2), np.int32), np.array([2]), np.array([8]), 8),
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    refused(*REFUSALS[name])
