"""Drafters that refine guesses sweep by sweep, against the papers' loops written out by hand."""

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import engine, exactness, trees
from specjax.drafters import grow
from specjax.drafters.jacobi import jacobi
from specjax.drafters.lookahead import LookaheadState, insert, lookahead
from specjax.drafters.speculative_jacobi import speculative_jacobi
from specjax.laboratory import Parts, tabular_pair
from specjax.models.tabular import random_table, tabular
from specjax.sampling import sampling
from specjax.types import Cache, Context, Draft, Params
from specjax.verifiers.block import block
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

SLOTS = 40
WOR, COUPLED = grow.without_replacement(), grow.coupled()


class Moment(NamedTuple):
    """What there is before a pass, as NumPy arrays."""

    tokens: np.ndarray  # [B, S]
    length: np.ndarray  # [B]
    done: np.ndarray  # [B]
    drafter: Any
    draft: Draft

    def text(self, row: int) -> list[int]:
        return self.tokens[row, : self.length[row]].tolist()

    def seen(self, row: int) -> list[tuple[int, ...]]:
        """What each node below the root sees besides it, itself included."""
        masks = np.asarray(trees.ancestor_mask(self.draft.parents[row]))
        assert masks[:, 0].all()
        return sorted(tuple(self.draft.tokens[row][mask][1:].tolist()) for mask in masks[1:])


def followed(vocab_size: int, drafter: Any, verifier: Any) -> Callable[..., list[Moment]]:
    """A decoder of tables, compiled once, whose passes can be looked at one by one."""
    decoder = engine.decoder(tabular(vocab_size), drafter, verifier)

    @jax.jit
    def step(params: Params, state: Any) -> tuple[Draft, Any]:
        draft, _ = drafter.propose(params, state.rng_keys, state.drafter, state.context)
        return draft, decoder.step(params, state)[0]

    def moments(
        table: np.ndarray, prompts: list, limits: list, law: Any, begin: Any = None
    ) -> list[Moment]:
        """Before each pass and after the last; the drafter may be told in what state to begin."""
        lengths = np.array([len(text) for text in prompts])
        prompt = np.array([np.resize(text, max(lengths)) for text in prompts], np.int32)
        keys = jax.random.split(jax.random.key(3), len(prompts))
        rows = (keys, law, prompt, lengths, np.array(limits))
        state = engine.prefill(decoder, Params(table), *rows, SLOTS)
        state = state if begin is None else replace(state, drafter=begin)
        found: list[Moment] = []
        while not found or not found[-1].done.all():
            draft, following = step(Params(table), state)
            seen = (state.context.tokens, state.context.length, state.done, state.drafter, draft)
            found.append(Moment(*jax.tree.map(np.asarray, seen)))
            state = following
        return found

    return moments


def greedy(table: np.ndarray, text: list[int]) -> int:
    """The target's choice after a text; before its first token comes token 0."""
    return int(table[text[-2] if len(text) > 1 else 0, text[-1]].argmax())


def continued(table: np.ndarray, text: list[int], end: int) -> list[int]:
    """Plain greedy decoding."""
    while len(text) < end:
        text = [*text, greedy(table, text)]
    return text


V = 10
RANDOM = random_table(np.random.default_rng(0), V).astype(np.float32)
# What follows is known from the last token: 0 1 4 3 0 .., 5 6 9 8 5 .. and 2 7 2 ..
CYCLES = np.broadcast_to(5 * np.eye(V)[[1, 4, 7, 0, 3, 6, 9, 2, 5, 8]], (V, V, V)).astype("f")
PROMPTS = [[0], [5, 6], [2, 9, 2, 9, 2, 9], [3, 3, 3], [7, 8, 1, 4]]
LIMITS = [SLOTS, 25, SLOTS, 30, 3]

# ----------------------------------------------------------------------------------------- jacobi


def jacobi_by_hand(table: np.ndarray, text: list[int], end: int, n: int) -> tuple[list, list[int]]:
    """The window before every sweep and what it guesses, and the text in the end.

    What no sweep has said yet is -1, and is guessed to be the last token once more.
    """
    windows, window = [], [-1] * n
    while len(text) < end:
        old = [text[-1] if y < 0 else y for y in window]
        windows.append((window, old))
        new = [greedy(table, text + old[:i]) for i in range(n + 1)]  # all given the old ones
        kept = next((i for i in range(n) if old[i] != new[i]), n)
        text = (text + new[: kept + 1])[:end]
        # Behind a window comes more of its end, unless that has become text itself.
        window = new[kept + 1 :] + [new[n]] * kept if kept < n else [-1] * n
    return windows, text


def test_jacobi_sweeps_its_window_as_the_paper_does() -> None:
    n, gained = 4, set()
    decode = followed(V, jacobi(n), match())
    for table in (RANDOM, CYCLES):
        moments = decode(table, PROMPTS, LIMITS, sampling(5))
        for row, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True)):
            windows, text = jacobi_by_hand(table, prompt, limit, n)
            assert moments[-1].text(row) == text == continued(table, prompt, limit)
            passes = [x for x in moments if not x.done[row]]
            drafts = [(x.drafter.tokens[row], x.draft.tokens[row, 1:]) for x in passes]
            assert [(x.tolist(), y.tolist()) for x, y in drafts] == windows
            gained |= set(np.diff([x.length[row] for x in passes]).tolist())
    assert gained >= {1, 2, n + 1}, "sweeps that change all, some and nothing of a window"


# -------------------------------------------------------------------------------------- lookahead

# What the nodes of a window of W = 3, N = 4 see besides the root: 23 is in row 2 and column 3.
WINDOW = """11        11 12        11 12 13
            11 21     11 12 22     11 12 13 23
            11 21 31  11 12 22 32  11 12 13 23 33"""
# N-grams see themselves. A beginning of two is shared, and the second's copy of it is a filler.
GRAMS = "41  41 42  41 42 43  41  41 52  41 52 53  61  61 62  61 62 63"


def test_nodes_see_what_the_paper_lets_them_see() -> None:
    drafter = lookahead(tabular(100), 3, 4, 3, pool_size=5)
    window = jnp.array([[[11, 12, 13], [21, 22, 23], [31, 32, 33]]])
    pool = jnp.full((1, 5, 3, 4), -1)
    pool = pool.at[0, 4].set(jnp.array([[9, 41, 42, 43], [9, 41, 52, 53], [9, 61, 62, 63]]))
    tokens, length = jnp.array([[80, 81, 82, 9, 7, 7]]), jnp.array([4])
    context = Context(tokens, length, length + 2, Cache((), (), length - 1), sampling(1))
    state = LookaheadState(window, pool)
    draft = jax.jit(lambda: drafter.propose(Params(()), None, state, context)[0])()
    moment = Moment(*jax.tree.map(np.asarray, (tokens, length, False, state, draft)))
    expected = [tuple(map(int, x.split())) for x in re.split(r"\s\s+", f"{WINDOW}  {GRAMS}")]
    assert moment.seen(0) == sorted(expected)
    # At most 3 of them are accepted: 6 nodes of the window and 8 of n-grams are in reach of that.
    assert draft.num_drafted == 6 + 8
    assert (draft.depth, drafter.proposal.num_nodes) == (3, 1 + 3 * 3 + 3 * 3)


def put(places: list[list], gram: list[int], num_guesses: int) -> None:
    """Into the least recently used order of its place, in front."""
    place = places[gram[0] % len(places)]
    place[:] = [gram, *(x for x in place if x != gram)][:num_guesses]


def padded(places: list[list], num_guesses: int, n: int) -> list:
    return [place + [[-1] * n] * (num_guesses - len(place)) for place in places]


def test_the_most_recent_n_grams_stay() -> None:
    """Against insertions one after another into lists."""
    rng, rows, places, num_guesses, count, n = np.random.default_rng(0), 30, 3, 3, 6, 2
    pool = jnp.full((rows, places, num_guesses, n), -1, jnp.int32)
    lists: list[list[list]] = [[[] for _ in range(places)] for _ in range(rows)]
    insert_all = jax.jit(insert)
    for _ in range(8):
        grams = rng.integers(0, 4, (rows, count, n)).astype(np.int32)
        is_new = rng.random((rows, count)) < 0.7
        pool = insert_all(pool, grams, is_new)
        for row, i in np.argwhere(is_new):
            put(lists[row], grams[row, i].tolist(), num_guesses)
        assert pool.tolist() == [padded(x, num_guesses, n) for x in lists]


W, N, G, H = 3, 3, 2, 4
LOOKAHEAD = followed(V, lookahead(tabular(V), W, N, G, H), match())


def test_a_step_of_lookahead_worked_by_hand() -> None:
    """Of row 0 nothing is accepted, of row 1 one token; row 2 is done. Two more fill the batch."""
    window = np.array([[[8, 1, 2], [5, 4, 9]], [[1, 8, 2], [7, 3, 5]]], np.int32)[[0, 1, 0, 0, 0]]
    pool = np.full((5, H, G, N), -1, np.int32)
    pool[::2, :3] = [[[0, 7, 7], [8, 5, 6]], [[1, 9, 9], [5, 0, 0]], [[2, 9, 8], [6, 6, 6]]]
    begin = LookaheadState(jnp.asarray(window), jnp.asarray(pool))
    prompts, limits = [[3, 0]] * 5, [6, 6, 2, 6, 6]
    _, second, third, *_ = LOOKAHEAD(CYCLES, prompts, limits, sampling(5), begin)
    assert [second.text(row) for row in range(3)] == [[3, 0, 1], [3, 0, 1, 4], [3, 0]]
    windows, pools = second.drafter.window.tolist(), second.drafter.pool.tolist()
    # After 5, 4 and 9 the target says 6, 3 and 8: the next row. One token gained is no shift.
    assert windows[0] == [[5, 4, 9], [6, 3, 8]]
    # At 0 one moves to the front, at 1 one is new and the last goes, at 2 it is in front already.
    expected = [[[8, 5, 6], [0, 7, 7]], [[1, 4, 3], [1, 9, 9]], [[2, 9, 8], [6, 6, 6]]]
    assert pools[0] == padded([*expected, []], G, N)
    # The second token gained voids what was guessed in its place, 7 and 2.
    assert windows[1] == [[3, 5, -1], [0, 6, -1]]
    assert pools[1] == padded([[[8, 3, 0]], [[1, 7, 2]], [[2, 5, 6]], []], G, N)
    assert (windows[2], pools[2]) == (window[2].tolist(), pool[2].tolist())
    # The next guesses: n-grams after 1, and the window's rows beside them.
    grams = [(4,), (4, 3), (9,), (9, 9)]
    columns = [(5,), (5, 4), (5, 4, 9), (5, 6), (5, 4, 3), (5, 4, 9, 8)]
    assert second.seen(0) == sorted(grams + columns)
    # None after 4: four fillers. 1 and 4 are what history has, the window's reach of 4 before.
    columns = [(3,), (3, 5), (3, 5, 1), (3, 0), (3, 5, 6), (3, 5, 1, 4)]
    assert second.seen(1) == sorted([(4,)] * 4 + columns)
    assert third.text(0) == [3, 0, 1, 4, 3, 0], "a whole n-gram and the token after it"


def lookahead_by_hand(table: np.ndarray, text: list[int], end: int) -> tuple[list, list[int]]:
    """The window and the pool before every pass, and the text in the end."""
    window, pool, states = [[-1] * W] * (N - 1), [[] for _ in range(H)], []
    while len(text) < end:
        states.append((window, padded(pool, G, N)))
        t, reach = len(text), W + N - 2
        # While nothing is known of a position, it is guessed by the token its reach before.
        known = [
            [x if x >= 0 else text[max(t + j + i - reach, 0)] for i, x in enumerate(y)]
            for j, y in enumerate(window)
        ]
        columns = list(zip(*known, strict=True))
        seen = [[*known[0][:i], *columns[i]] for i in range(W)]
        fresh = [greedy(table, text + x) for x in seen]
        guesses = [x[1:] for x in pool[text[-1] % H] if x[0] == text[-1]]
        # A guess that is missing is filled with the root, which may happen to be right.
        guesses += [text[-1:]] * (len(guesses) < G) + [x[: N - 1] for x in seen]
        truth = continued(table, text, t + N)
        agree = [[x[:k] == truth[t : t + k] for k in range(1, len(x) + 1)] for x in guesses]
        kept = max(map(sum, agree))
        for column, last in zip(columns, fresh, strict=True):
            put(pool, [*column, last], G)
        window = [(y + [-1] * N)[kept : kept + W] for y in [*window[1:], fresh]]
        text = truth[: min(t + kept + 1, end)]
    return states, text


@pytest.mark.parametrize("table", [RANDOM, CYCLES], ids=["random", "cycles"])
def test_lookahead_decodes_as_the_paper_does(table: np.ndarray) -> None:
    """Pass by pass; and where the text is periodic the pool soon knows it by heart."""
    moments = LOOKAHEAD(table, PROMPTS, LIMITS, sampling(5))
    for row, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True)):
        states, text = lookahead_by_hand(table, prompt, limit)
        assert moments[-1].text(row) == text == continued(table, prompt, limit)
        passes = [x for x in moments if not x.done[row]]
        found = [(x.drafter.window[row].tolist(), x.drafter.pool[row].tolist()) for x in passes]
        assert found == states
        if table is CYCLES:
            gained = np.diff([x.length[row] for x in passes])
            assert (gained[5:] == N).all(), "whole n-grams and a token, all the time"
    assert (moments[-1].length - moments[0].length).sum() > 1.3 * sum(sum(~x.done) for x in moments)


# ----------------------------------------------------------------------------- speculative jacobi

ROWS, FEW, WINDOW_SIZE = 64, 5, 7
TABLE = random_table(np.random.default_rng(4), FEW).astype(np.float32)
LAW = sampling(ROWS, np.resize([0, 0.6, 1.0, 1.3], ROWS), np.resize([0, 0, 3, 0, 2], ROWS))


@functools.cache
def speculated(choose: grow.Choose) -> list[Moment]:
    """Random prompts continued under rejection, every row with a temperature of its own."""
    rng = np.random.default_rng(5)
    drafter = speculative_jacobi(tabular(FEW), WINDOW_SIZE, choose)
    prompts = [rng.integers(0, FEW, 1 + row % 5).tolist() for row in range(ROWS)]
    return followed(FEW, drafter, rejection())(TABLE, prompts, [SLOTS] * ROWS, LAW)


def law_by_hand(logits: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    if temperature == 0:
        return np.eye(FEW)[logits.argmax()]
    kept = logits >= (np.sort(logits)[-top_k] if top_k else -np.inf)
    weights = np.where(kept, np.exp(logits / temperature), 0)
    return weights / weights.sum()


@pytest.mark.parametrize("choose", [WOR, COUPLED], ids=["fresh", "coupled"])
def test_q_is_the_law_of_the_sweep_before(choose: grow.Choose) -> None:
    """The target's warped law given the old window, wherever the verdict has moved it."""
    moments, n, found, expected, gains = speculated(choose), WINDOW_SIZE, [], [], set()
    for row, law in enumerate(zip(LAW.temperature.tolist(), LAW.top_k.tolist(), strict=True)):
        # At first the law that predicted the root, if anything did.
        text = [0, *moments[0].text(row)]  # a text begins behind token 0
        said = TABLE[text[-3], text[-2]] if len(text) > 2 else np.zeros(FEW)
        laws = [law_by_hand(said, *law)] * n
        for before, after in itertools.pairwise(x for x in moments if not x.done[row]):
            tokens = before.draft.tokens[row, 1:]
            found.append(before.draft.probs[row, 1:])
            expected.append(laws)
            gained = int(after.length[row] - before.length[row])
            gains.add(gained)
            seen = [0, *before.text(row), *tokens]
            # Beyond the window the law of its end goes on.
            ends = [int(before.length[row]) + min(gained + i, n) for i in range(n)]
            laws = [law_by_hand(TABLE[seen[end - 1], seen[end]], *law) for end in ends]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    assert gains == set(range(1, n + 2))


def test_coupled_tokens_stay_while_their_laws_do() -> None:
    """So that windows settle, and are accepted further than those that are drawn anew."""
    for choose in (WOR, COUPLED):
        stays: list[bool] = []
        for before, after in itertools.pairwise(speculated(choose)):
            for row in np.flatnonzero(~after.done):
                gained = after.length[row] - before.length[row]
                old = [x[row, 1 + gained :] for x in (before.draft.tokens, before.draft.probs)]
                new = [x[row, 1 : 1 + len(old[0])] for x in (after.draft.tokens, after.draft.probs)]
                is_same_law = (old[1] == new[1]).all(-1) & (old[1].max(-1) < 0.9)
                stays += (old[0] == new[0])[is_same_law].tolist()
        assert len(stays) > 200
        assert all(stays) == (choose is COUPLED)
    fresh, coupled = (sum(~x.done for x in speculated(choose)) for choose in (WOR, COUPLED))
    is_greedy = np.asarray(LAW.temperature) == 0
    assert (fresh == coupled)[is_greedy].all(), "point masses either way"
    assert coupled[~is_greedy].sum() < 0.95 * fresh[~is_greedy].sum()


# ------------------------------------------------------------------------------------------ exact

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("make", "rule", "num_steps"),
    [
        pytest.param(lambda x: jacobi(2), match, 2, marks=SLOW),
        (lambda x: lookahead(x, 2, 3, 1), rejection, 2),
        (lambda x: speculative_jacobi(x, 2, WOR), block, 2),
        pytest.param(lambda x: speculative_jacobi(x, 2, COUPLED), match, 2, marks=SLOW),
        pytest.param(lambda x: jacobi(2), rejection, 3, marks=SLOW),
        pytest.param(lambda x: lookahead(x, 2, 3, 2, 2), match, 3, marks=SLOW),
        pytest.param(lambda x: lookahead(x, 1, 2, 1), match, 3, marks=SLOW),
        pytest.param(lambda x: speculative_jacobi(x, 3, WOR), rejection, 3, marks=SLOW),
        pytest.param(lambda x: speculative_jacobi(x, 3, COUPLED), rejection, 3, marks=SLOW),
    ],
)
def test_text_has_the_targets_law(make: Callable, rule: Callable, num_steps: int) -> None:
    check = exactness.enumeration(
        lambda pair: Parts(make(pair.target), (), rule()), tabular_pair(3), num_steps=num_steps
    )
    jax.clear_caches()
    assert check.passed, check.verdict
    assert check.figures["expected_tokens"][0] > 1.01


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: jacobi(0), "num_tokens=0.* no window; it must be at least 1"),
        (lambda x: speculative_jacobi(x, -1, WOR), "num_tokens=-1.* no window; .* at least 1"),
        (lambda x: lookahead(x, 0, 3, 2), "width=0, .* at least 1, 2 and 1"),
        (lambda x: lookahead(x, 3, 1, 2), "ngram=1, .* at least 1, 2 and 1"),
        (lambda x: lookahead(x, 3, 3, 0), "num_guesses=0.* at least 1, 2 and 1"),
        (lambda x: lookahead(x, 3, 3, 2, 0), "pool_size is 0; .* at least 1 place"),
        (lambda x: jacobi(4).init(2, 4), "jacobi's window reaches 4 tokens .* buffer holds 4"),
        (
            lambda x: speculative_jacobi(x, 9, WOR).init(2, 8),
            "speculative_jacobi's window reaches 9 tokens .* but the buffer holds 8",
        ),
        (lambda x: lookahead(x, 3, 4, 2).init(2, 5), "reaches 5 tokens .* but the buffer holds 5"),
    ],
)
def test_impossible_drafters_are_refused(make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tabular(3))
    lookahead(tabular(3), 3, 4, 2).init(2, 6)  # the smallest buffer for that window
