"""N-gram tables: what they hold, what they draft, what becomes of text."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from refusals import refused
from texts import Text, Tokens, context_of, drafts_exactly, proposing, strings_of

from specjax import engine
from specjax.drafters.ngram import FINGERPRINT, NgramState, fingerprints, ngram
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.sampling import sampling
from specjax.types import (
    Context,
    Outcome,
    Params,
    Verdict,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

V, ORDER, SLOTS = 4, 4, 40
CONTEXTS = [c for n in range(1, ORDER) for c in itertools.product(range(V), repeat=n)]


@functools.cache
def marks() -> dict[Tokens, int]:
    """The fingerprints of all contexts of three tokens at most."""
    newest_first = np.array([[*c[::-1], *[0] * (ORDER - 1 - len(c))] for c in CONTEXTS], np.int32)
    found = np.asarray(fingerprints(jnp.asarray(newest_first), ORDER))
    return {c: int(row[len(c) - 1]) for c, row in zip(CONTEXTS, found, strict=True)}


class Tables:
    """ANPD's tables in plain Python; `home` says which contexts share a slot."""

    def __init__(self, home: Callable[[Tokens], Any], order: int = ORDER) -> None:
        self.home, self.order = home, order
        self.entries: dict[Any, tuple[Tokens, int, int]] = {}  # home -> context, token, count

    def learn(self, text: Text, first: int = 0) -> None:
        """Everything from place `first` on."""
        for i in range(first, len(text)):
            for n in range(2, self.order + 1):
                if i >= n - 1:
                    self.meet(tuple(text[i - n + 1 : i]), text[i])

    def meet(self, context: Tokens, token: int) -> None:
        home = self.home(context)
        old, what, count = self.entries.get(home, ((), -1, 0))
        if (old, what) == (context, token):
            self.entries[home] = (context, token, count + 1)
        elif count > 1:
            self.entries[home] = (old, what, count - 1)
        else:
            self.entries[home] = (context, token, 1)

    def draft(self, text: Text, num_tokens: int) -> list[int]:
        text, drafted = list(text), []
        while len(drafted) < num_tokens:
            for n in range(min(self.order - 1, len(text)), 0, -1):
                context = tuple(text[-n:])
                old, token, _ = self.entries.get(self.home(context), ((), -1, 0))
                if old == context:
                    drafted.append(token)
                    text.append(token)
                    break
            else:
                return drafted
        return drafted


def test_tables_by_hand() -> None:
    """The longest context first, then what follows most; a slot is fought for."""
    tables = Tables(lambda context: context, order=3)
    tables.learn([0, 1, 2, 0, 1, 2, 1, 1, 0])
    assert tables.entries[0, 1] == ((0, 1), 2, 2)
    assert tables.entries[1,] == ((1,), 0, 1)  # 2 twice, then 1, then 0
    assert tables.draft([0, 1], 3) == [2, 1, 1]
    assert tables.draft([2, 2, 3], 3) == []
    tables = Tables(len, order=2)
    tables.learn([0, 0, 0, 1])
    assert tables.entries == {1: ((0,), 0, 1)}  # up twice, down once
    tables.learn([0, 0, 0, 1, 2], 4)
    assert tables.entries == {1: ((1,), 2, 1)}


def entries_of(table: np.ndarray, num_slots: int) -> list[tuple[Tokens, int, int]]:
    """What a table holds."""
    found = []
    for size, rows in enumerate(table.reshape(ORDER - 1, num_slots, 3), 1):
        named = {mark: c for c, mark in marks().items() if len(c) == size}
        for mark, token, count in rows[rows[:, 2] > 0]:
            found.append((named[int(mark.astype(np.uint32))], int(token), int(count)))
    return sorted(found)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5000])
def test_ngram_drafts_from_the_papers_tables(num_slots: int) -> None:
    """Texts arrive in pieces of any size, none too; tables and drafts are compared each time."""

    def home(context: Tokens) -> tuple[int, ...]:
        return len(context), marks()[context] % num_slots

    is_roomy = num_slots == 5000
    if is_roomy:
        assert len(set(map(home, CONTEXTS))) == len(CONTEXTS), "nothing is fought for"
    b, width, num_tokens = 8, 7, 5
    rng = np.random.default_rng(num_slots)
    texts = [rng.choice(V, SLOTS, p=rng.dirichlet([1.0] * V)).tolist() for _ in range(b)]
    drafter = ngram(num_tokens, ORDER, num_slots)
    propose = proposing(drafter)
    path = jnp.zeros((b, width), jnp.int32)

    @jax.jit
    def observe(state: NgramState, context: Context, count: jax.Array) -> NgramState:
        outcome = Outcome(None, None, Verdict(path, count, count))
        return drafter.observe(Params(()), state, context, outcome)

    state, expected = (
        drafter.init(b, SLOTS),
        [Tables(tuple if is_roomy else home) for _ in range(b)],
    )
    length, drafted = np.ones(b, np.int32), Counter[int]()
    while (length < SLOTS).any():
        count = np.minimum(rng.integers(0, width + 1, b), SLOTS - length).astype(np.int32)
        length = length + count
        context = context_of([t[:n] for t, n in zip(texts, length, strict=True)], SLOTS)
        state = observe(state, context, jnp.asarray(count))
        draft = propose((), context, state)
        assert draft.probs is None
        np.testing.assert_array_equal(draft.parents, np.tile(np.arange(6) - 1, (b, 1)))
        for row in range(b):
            text = texts[row][: length[row]]
            expected[row].learn(text, int(length[row] - count[row]))
            found = entries_of(np.asarray(state.table[row]), num_slots)
            assert found == sorted(expected[row].entries.values())
            guess = expected[row].draft(text, num_tokens)
            assert strings_of(draft, row) == [tuple(guess[: i + 1]) for i in range(len(guess))]
            drafted[len(guess)] += 1
    assert drafted[0]
    assert drafted[num_tokens]
    stopped = drafted.total() - drafted[0] - drafted[num_tokens]
    assert stopped or num_slots not in (2, 3), "some on the way"


def test_tables_are_a_function_of_the_text() -> None:
    """Prompts at once, token by token, and steps that commit several tokens: the same tables."""
    drafter = ngram(3, order=3, num_slots=4)
    pair, slots = tabular_pair(3, seed=3), 24
    decoder, params = engine.decoder(pair.target, drafter, match()), Params(pair.target_params)
    prompts = [[0], [1, 2, 1], [2, 2, 0, 0, 1, 0], [1, 0]]
    limit = np.array([24, 20, 17, 24], np.int32)
    keys, warp = jax.random.split(jax.random.key(0), 4), sampling(4, 0.7)
    first = context_of(prompts, slots)
    decoded = engine.decode(
        decoder, params, keys, warp, first.tokens, first.length, limit, max_length=slots
    )
    tokens, length = decoded.context.tokens, decoded.context.length
    np.testing.assert_array_equal(length, limit)
    gained = limit - np.asarray(first.length)
    assert (decoded.num_steps < gained).any(), "several at once"
    at_once = engine.prefill(decoder, params, keys, warp, tokens, length, limit, max_length=slots)

    @jax.jit
    def one_by_one(params: Params, tokens: jax.Array, length: jax.Array) -> Any:
        def append(state: Any, i: jax.Array) -> tuple[Any, None]:
            token = lax.dynamic_slice_in_dim(tokens, i, 1, 1)
            return decoder.force(params, state, token, (i < length).astype(jnp.int32)), None

        state = decoder.init(keys, warp, tokens[:, 0], limit, slots)
        return lax.scan(append, state, jnp.arange(1, slots))[0]

    alone = one_by_one(params, tokens, length)
    np.testing.assert_array_equal(at_once.drafter.table, decoded.drafter.table)
    np.testing.assert_array_equal(alone.drafter.table, decoded.drafter.table)
    assert np.asarray(decoded.drafter.table)[..., FINGERPRINT].any(1).all()


@pytest.mark.parametrize("rule", [match, rejection])
@pytest.mark.slow
def test_drafts_are_exact(rule: Callable[[], Verifier]) -> None:
    def factory(pair: Pair) -> Parts:
        return Parts(ngram(2, order=3, num_slots=2), (), rule())

    drafts_exactly(factory)


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no token": (lambda: ngram(0), "num_tokens=0, order=5.* at least 1, 2 and 1"),
    "no context": (lambda: ngram(2, order=1), "order=1.* at least 1, 2 and 1"),
    "no slot": (lambda: ngram(2, num_slots=0), "num_slots=0.* at least 1, 2 and 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    refused(*REFUSALS[name])
