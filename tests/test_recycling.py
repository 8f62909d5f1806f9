"""Token Recycling: what it learns, inherits and fills its tree with."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from texts import context_of, drafts_exactly, proposing

from specjax import engine, trees
from specjax.drafters.recycling import RecyclingState, destinations, inherited, recycling, tree
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.models.tabular import tabular
from specjax.sampling import sampling
from specjax.types import (
    Draft,
    ModelOutput,
    Outcome,
    Params,
    Verdict,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection


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
    draft = proposing(drafter)((), context_of([[2, 0], [4], [3]], 4), state)
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

    # Another request knows what these three have seen, and rows that saw more keep their own.
    shared = inherited(state.drafter)
    known = (m >= 0).all(2).any(0)
    np.testing.assert_array_equal(shared[known], right[known])
    assert (np.asarray(shared)[~known] == -1).all()
    again = engine.decode(
        decoder,
        params._replace(drafter=shared),
        *(keys, sampling(3, 0.0), prompts.tokens, prompts.length, limit, 40),
    )
    np.testing.assert_array_equal(again.context.tokens, state.context.tokens)
    assert (again.num_steps < state.num_steps).all()
    kept = np.asarray(inherited(RecyclingState(jnp.full((2, v, k), -1)), shared))
    np.testing.assert_array_equal(kept, shared)


def test_recycling_inherits_what_a_row_has_not_seen() -> None:
    drafter = recycling(tabular(4), (-1, 0, 0, 1), k=2)
    own = jnp.asarray([[[1, 2], [-1, -1], [3, 0], [-1, -1]]], jnp.int32)
    shared = jnp.asarray([[3, 3], [0, 2], [1, 1], [-1, -1]], jnp.int32)
    draft = proposing(drafter)(shared, context_of([[2, 0]], 4), RecyclingState(own))
    assert draft.tokens.tolist() == [[0, 1, 2, 0]]
    wrong = r"2 successors of 4 tokens but the matrix it inherits has shape \(4, 3\)"
    with pytest.raises(ValueError, match=wrong):
        proposing(drafter)(jnp.zeros((4, 3), jnp.int32), context_of([[0]], 4), RecyclingState(own))


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


@pytest.mark.parametrize("rule", [match, pytest.param(rejection, marks=pytest.mark.slow)])
def test_drafts_are_exact(rule: Callable[[], Verifier]) -> None:
    def factory(pair: Pair) -> Parts:
        return Parts(recycling(pair.target, (-1, 0, 0, 1), k=2), (), rule())

    drafts_exactly(factory)


V3 = tabular(3)
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
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


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused(name: str) -> None:
    refused(*REFUSALS[name])
