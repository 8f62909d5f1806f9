"""Drafts out of what text and target have shown: n-gram tables, bigrams, recycled runners-up."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from specjax import engine, exactness, testing, trees
from specjax.drafters.ngram import FINGERPRINT, NgramState, fingerprints, ngram
from specjax.drafters.ngrammys import bigrams, ngrammys
from specjax.drafters.recycling import RecyclingState, destinations, recycling, tree
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.models.tabular import tabular
from specjax.models.transformer import forward
from specjax.sampling import sampling
from specjax.types import (
    Cache,
    Context,
    Draft,
    Drafter,
    ModelOutput,
    Outcome,
    Params,
    Verdict,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

Text = Sequence[int]
Tokens = tuple[int, ...]


def context_of(texts: Sequence[Text], slots: int) -> Context:
    """Histories with garbage behind them."""
    tokens = np.random.default_rng(7).integers(0, 3, (len(texts), slots)).astype(np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    length = jnp.asarray([len(text) for text in texts], jnp.int32)
    cache = Cache((), (), length - 1)
    return Context(jnp.asarray(tokens), length, length, cache, sampling(len(texts)))


def proposing(drafter: Drafter) -> Callable[[Any, Any, Context], Draft]:
    """(params, state, context) -> the draft."""
    return jax.jit(lambda *args: drafter.propose(Params((), args[0]), None, *args[1:])[0])


def random_texts(seed: int, count: int, longest: int, vocab_size: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [rng.integers(0, vocab_size, n).tolist() for n in lengths]


def strings_of(draft: Draft, row: int) -> list[Tokens]:
    """What each drafted node spells; all others are the root's token below the root."""
    tokens, parents = np.asarray(draft.tokens[row]), np.asarray(draft.parents[row])
    count = 1 + int(draft.num_drafted[row])
    found: list[Tokens] = [()]
    for i in range(1, count):
        assert 0 <= parents[i] < i
        found.append((*found[parents[i]], int(tokens[i])))
    assert (tokens[count:] == tokens[0]).all()
    return found[1:]


# ------------------------------------------------------------------------------------------- ngram

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
        draft = propose((), state, context)
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


# ---------------------------------------------------------------------------------------- ngrammys


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
    draft = proposing(drafter)(TABLE, (), context_of([BY_HAND], 30))
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
    draft = proposing(drafter)(table, (), context_of(texts, 20))
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
    draft = proposing(drafter)(table, (), context_of([[0], [0, 1], [2, 1, 0]], 4))
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


# --------------------------------------------------------------------------------------- recycling


def random_outcome(seed: int, b: int, n: int, v: int) -> Outcome:
    """Trees with equal tokens, absent nodes at their ends, and rows that are finished."""
    rng = np.random.default_rng(seed)
    tokens, logits = rng.integers(0, v, (b, n)), rng.normal(size=(b, n, v))
    parents, path = np.full((b, n), -1), np.zeros((b, 4), np.int64)
    num_nodes = np.zeros(b, np.int64)
    for row in range(b):
        present = rng.integers(1, n + 1)
        for i in range(1, present):
            parents[row, i] = rng.integers(0, i)
        nodes = [int(rng.integers(0, present))]
        while nodes[0]:
            nodes.insert(0, int(parents[row, nodes[0]]))
        nodes = nodes[:4]
        path[row, : len(nodes)] = nodes
        num_nodes[row] = rng.integers(0, len(nodes) + 1)
    tokens, parents, path, num_nodes = (
        jnp.asarray(x, jnp.int32) for x in (tokens, parents, path, num_nodes)
    )
    draft = Draft(tokens, parents, None, (parents >= 0).sum(1), depth=3)
    scored = jnp.asarray(logits, jnp.float32)
    return Outcome(draft, ModelOutput(scored, scored), Verdict(path, num_nodes, num_nodes))


def last_nodes(outcome: Outcome, row: int) -> dict[int, int]:
    """By token the node that teaches it: the last one; guesses of the root's only if kept."""
    draft, verdict = outcome.draft, outcome.verdict
    tokens, parents = draft.tokens[row].tolist(), draft.parents[row].tolist()
    kept = verdict.path[row, : int(verdict.num_nodes[row])].tolist()
    if not kept:
        return {}
    teachers = {tokens[0]: 0}
    for i, token in enumerate(tokens):
        if parents[i] >= 0 and (token != tokens[0] or i in kept):
            teachers[token] = i
    return teachers


def test_recycling_learns_from_every_node() -> None:
    b, n, v, k = 400, 6, 4, 3
    outcome = random_outcome(0, b, n, v)
    old = np.random.default_rng(1).integers(-1, v, (b, v, k)).astype(np.int32)
    drafter = recycling(tabular(v), (-1, 0, 0), k)

    @jax.jit
    def observe(state: RecyclingState, outcome: Outcome) -> tuple[jax.Array, RecyclingState]:
        state = drafter.observe(Params(()), state, None, outcome)
        return destinations(outcome, v), state

    where, state = observe(RecyclingState(jnp.asarray(old)), outcome)
    where, logits = np.asarray(where), np.asarray(outcome.output.logits)
    kinds = Counter[str]()
    for row in range(b):
        teachers = last_nodes(outcome, row)
        found = {int(token): node for node, token in enumerate(where[row]) if token < v}
        assert found == teachers
        assert len(set(where[row].tolist())) == n, "rows of one scatter are distinct"
        expected = old[row].copy()
        for token, node in teachers.items():
            expected[token] = np.argsort(-logits[row, node])[:k]
        np.testing.assert_array_equal(state.successors[row], expected)
        count = int(outcome.verdict.num_nodes[row])
        rejected = set(teachers.values()) - set(outcome.verdict.path[row, :count].tolist())
        root = teachers.get(int(outcome.draft.tokens[row, 0]))
        kinds.update({"finished": not count, "rejected": bool(rejected), "kept": bool(root)})
    assert min(kinds.values()) > 10, kinds


def test_recycling_fills_its_tree_breadth_first() -> None:
    """Child r of a node is its token's successor r; below what was not seen there is nothing."""
    drafter = recycling(tabular(5), (-1, 0, 0, 1, 1, 1, 2, 4), k=3)
    assert drafter.proposal == ("point", 8, 3)
    unseen = [-1] * 3
    matrix = [[1, 2, 3], [0, 4, 2], [2, 0, 1], unseen, [3, 1, 0]]
    state = RecyclingState(jnp.asarray([matrix] * 3, jnp.int32))
    draft = proposing(drafter)((), state, context_of([[2, 0], [4], [3]], 4))
    np.testing.assert_array_equal(draft.parents, [[-1, 0, 0, 1, 1, 1, 2, 4]] * 3)
    # Below 0: 1 and 2; below that 1: 0 4 2; below that 2: 2; below that 4: 3.
    assert draft.tokens[0].tolist() == [0, 1, 2, 0, 4, 2, 2, 3]
    # Below 4: 3, which has no successors, and 1, which has 0.
    assert draft.tokens[1].tolist() == [4, 3, 1, 4, 4, 4, 0, 4]
    assert draft.tokens[2].tolist() == [3] * 8
    assert draft.num_drafted.tolist() == [7, 3, 0]
    assert draft.probs is None


def test_recycling_knows_a_chain_that_it_has_seen() -> None:
    """Where a token alone decides, what M holds is right, and greedy text needs few passes."""
    v, k = 9, 3
    law = np.random.default_rng(0).normal(0, 2, (v, v)).astype(np.float32)
    target = tabular(v)
    decoder = engine.decoder(target, recycling(target, tree(8, 3, k), k), match())
    prompts = context_of([[0, 3, 1], [2], [8, 7, 6, 5, 5]], 40)
    params = Params(jnp.broadcast_to(law, (v, v, v)))
    keys, limit = jax.random.split(jax.random.key(0), 3), np.full(3, 40, np.int32)
    state = engine.decode(
        decoder, params, keys, sampling(3, 0.0), prompts.tokens, prompts.length, limit, 40
    )
    m = np.asarray(state.drafter.successors)
    right = np.argsort(-law, -1)[:, :k]
    for row in range(3):
        seen = (m[row] >= 0).all(1)
        np.testing.assert_array_equal(m[row][seen], right[seen])
        assert (m[row][~seen] == -1).all()
        text = np.asarray(state.context.tokens[row])
        assert seen[text[:-1]].all(), "all but the pending token were fed"
        for i in range(int(prompts.length[row]), 40):
            assert text[i] == right[text[i - 1], 0]
    assert (state.num_steps < 20).all()


def worth(parents: Sequence[int]) -> float:
    """Expected tokens where the r-th successor is right with probability 1 / (r (r + 1))."""
    value = [1.0]
    for i, parent in enumerate(parents[1:], 1):
        r = 1 + list(parents[:i]).count(parent)
        value.append(value[parent] / (r * (r + 1)))
    return sum(value)


@pytest.mark.parametrize("num_nodes", [2, 3, 5, 7])
def test_no_tree_is_better(num_nodes: int) -> None:
    every = [
        trees.topology((-1, *rest))
        for rest in itertools.product(*(range(i) for i in range(1, num_nodes)))
        if list(rest) == sorted(rest)
    ]
    for depth, k in itertools.product((1, 2, 3, 6), (1, 2, 3, 6)):
        fitting = [t for t in every if t.depth <= depth and t.rank.max() < k]
        if not fitting:
            with pytest.raises(ValueError, match=f"{num_nodes} nodes .* depth {depth} with {k}"):
                tree(num_nodes, depth, k)
            continue
        found = tree(num_nodes, depth, k)
        assert found in [tuple(t.parents.tolist()) for t in fitting]
        assert worth(found) == pytest.approx(max(worth(t.parents) for t in fitting), rel=1e-12)


def test_a_tree_of_the_papers_size() -> None:
    t = trees.topology(tree(81, 6))
    assert len(t.parents) == 81
    assert (t.depth, int(t.rank.max())) == (6, 7)
    assert recycling(tabular(9), t.parents.tolist()).proposal == ("point", 81, 6)


# ------------------------------------------------------------------------------------------- exact


def parts_of(name: str, pair: Pair, verifier: Verifier) -> Parts:
    if name == "ngram":
        return Parts(ngram(2, order=3, num_slots=2), (), verifier)
    if name == "recycling":
        return Parts(recycling(pair.target, (-1, 0, 0, 1), k=2), (), verifier)
    drafter = ngrammys(pair.target, 2, 2, ngram=2, num_matches=2)
    return Parts(drafter, bigrams(pair.target, pair.target_params, 2), verifier)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("recycling", match),
        *(
            pytest.param(name, rule, marks=pytest.mark.slow)
            for name, rule in (
                *(("recycling", rejection), ("ngram", match), ("ngram", rejection)),
                *(("ngrammys", match), ("ngrammys", rejection)),
            )
        ),
    ],
)
def test_drafts_are_exact(name: str, rule: Callable[[], Verifier]) -> None:
    def factory(pair: Pair) -> Parts:
        return parts_of(name, pair, rule())

    check = exactness.enumeration(factory, tabular_pair(3), prompt=(1, 0, 2, 1, 0))
    assert check.passed, check.verdict
    assert 1.01 < check.figures["expected_tokens"][0] < 2.99, "some are kept, some are not"
    jax.clear_caches()


# ---------------------------------------------------------------------------------------- refusals

V3 = tabular(3)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "no token": (lambda: ngram(0), "num_tokens=0, order=5.* at least 1, 2 and 1"),
    "no context": (lambda: ngram(2, order=1), "order=1.* at least 1, 2 and 1"),
    "no slot": (lambda: ngram(2, num_slots=0), "num_slots=0.* at least 1, 2 and 1"),
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
    "another vocabulary": (
        lambda: engine.decoder(tabular_pair(3).target, recycling(tabular(4), (-1, 0), 1), match()),
        "vocabulary has 4 tokens and the target's 3",
    ),
    "a root alone": (lambda: recycling(V3, (-1,), 2), r"Tree \(-1,\) is its root alone"),
    "no root": (lambda: recycling(V3, (0, 0), 2), r"Tree \(0, 0\) must start with its root"),
    "children": (
        lambda: recycling(V3, (-1, 0, 0, 0), 2),
        "has 3 children of one node but recycling keeps 2",
    ),
    "successors": (lambda: recycling(V3, (-1, 0), 4), "keeps 4 successors but .* has 3 tokens"),
    "a tree of one node": (lambda: tree(1, 2, 2), "num_nodes=1, .* at least 2, 1 and 1"),
    "a flat tree": (lambda: tree(4, 0, 2), "depth=0, .* at least 2, 1 and 1"),
    "a tree of no children": (lambda: tree(4, 2, 0), "k=0.* at least 2, 1 and 1"),
    "too many nodes": (lambda: tree(8, 2, 2), "8 nodes .* depth 2 with 2 children .* 7 at most"),
}


def drafted(drafter: Drafter, weights: Any) -> None:
    drafter.propose(Params((), weights), None, (), context_of([[1, 0]], 4))


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    build, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)
