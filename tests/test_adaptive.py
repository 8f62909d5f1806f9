"""Chains that stop and trees that branch where the draft is sure, against loops by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as caches
from specjax import exactness
from specjax.drafters import adaptive, grow
from specjax.drafters.model import model
from specjax.laboratory import Pair, Parts, tabular_pair
from specjax.sampling import RANDOM, sampling, streams
from specjax.types import Array, Context, Draft
from specjax.verifiers.block import block
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection
from specjax.verifiers.traversal import traversal

ROWS, V = 60, 6
TABLE = np.random.default_rng(0).normal(0, 1.5, (V, V)).astype(np.float32)  # given the last token
LAW = np.exp(TABLE) / np.exp(TABLE).sum(1, keepdims=True)
ROOTS = np.arange(ROWS, dtype=np.int32) % V
STOPS = {
    "confidence": (adaptive.confidence(0.45), lambda q, path: q.max() < 0.45),
    "entropy": (
        adaptive.entropy(1.1),
        lambda q, path: np.sqrt(-(q * np.log(q)).sum()) > 1.1,
    ),
    "path": (adaptive.path(0.2), lambda q, path: path * q.max() < 0.2),
}
WOR, IID = grow.without_replacement(), grow.independent()


def grown(build: grow.Builder, roots: np.ndarray = ROOTS, temperature: float = 1.0) -> Draft:
    """With an `expand` that reads a node's law off its token."""
    b = len(roots)
    context = Context(
        jnp.asarray(roots)[:, None],
        jnp.ones([b], jnp.int32),
        jnp.full([b], 9, jnp.int32),
        caches.empty(0, (b, 1, 0, 1), jnp.float32),
        sampling(b, temperature),
    )

    def expand(
        carry: Any, tokens: Array, parents: Array, mask: Array, depth: int
    ) -> tuple[Array, Any]:
        assert parents.shape == tokens.shape
        assert mask.shape[:2] == tokens.shape
        return jnp.asarray(TABLE)[tokens], carry

    keys = streams(jax.random.split(jax.random.key(0), b), RANDOM)
    logits = jnp.asarray(TABLE)[jnp.asarray(roots)]
    return jax.jit(lambda: build.grow(expand, keys, context, logits, ()))()


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("choose", [grow.best(), WOR], ids=["best", "sampled"])
def test_a_chain_stops_where_its_rule_says(name: str, choose: grow.Choose) -> None:
    stop, expected = STOPS[name]
    build = adaptive.chain(4, choose, stop)
    draft = grown(build)
    assert build.proposal == ("point" if choose.law == "point" else "chain", 5, 4)
    lengths = set()
    for row, root in enumerate(ROOTS):
        tokens = np.asarray(draft.tokens)[row]
        last, so_far, count = root, 1.0, 0
        while count < 4 and (count == 0 or not expected(LAW[last], so_far)):
            count += 1
            so_far *= LAW[last][tokens[count]]
            last = tokens[count]
            if choose.law == "point":
                assert last == LAW[tokens[count - 1]].argmax()
        lengths.add(count)
        assert int(draft.num_drafted[row]) == count
        assert (tokens[count + 1 :] == root).all(), "fillers"
        if draft.probs is not None:
            q = np.asarray(draft.probs)[row]
            np.testing.assert_allclose(q[1 : count + 1], LAW[tokens[:count]], rtol=1e-5)
            np.testing.assert_array_equal(q[count + 1 :], np.eye(V)[[root] * (4 - count)])
    assert len(lengths) > 1, "rows stop at different places"
    np.testing.assert_array_equal(draft.parents[0], np.arange(5) - 1)


def test_passes_are_left_out_once_all_rows_have_stopped() -> None:
    """A pass that is taken says so; nobody goes on after the second token."""
    taken: list[int] = []

    def expand(
        carry: Any, tokens: Array, parents: Array, mask: Array, depth: int
    ) -> tuple[Array, Any]:
        jax.debug.callback(lambda: taken.append(depth))
        level = jnp.where(tokens[..., None] == 0, jnp.eye(3)[1] * 9, jnp.zeros(3))
        return level, carry

    build = adaptive.chain(5, grow.best(), adaptive.confidence(0.5))
    context = Context(
        jnp.full((2, 1), 2), jnp.ones([2], jnp.int32), *[None] * 2, sampling=sampling(2)
    )
    logits = jnp.broadcast_to(jnp.eye(3)[0] * 9, (2, 3))  # 0, then 1, then nobody knows
    draft = jax.jit(lambda: build.grow(expand, None, context, logits, ()))()
    jax.block_until_ready(draft.tokens)
    jax.effects_barrier()
    assert draft.tokens.tolist() == [[2, 0, 1, 2, 2, 2]] * 2
    assert draft.num_drafted.tolist() == [2, 2]
    assert taken == [1, 2]


@pytest.mark.parametrize(
    ("choose", "rule"),
    [
        (WOR, block),
        pytest.param(grow.coupled(), match, marks=pytest.mark.slow),
        pytest.param(grow.coupled(), rejection, marks=pytest.mark.slow),
        pytest.param(WOR, rejection, marks=pytest.mark.slow),
        pytest.param(grow.best(), traversal, marks=pytest.mark.slow),
    ],
)
def test_chains_that_stop_are_exact(choose: grow.Choose, rule: Any) -> None:
    def factory(pair: Pair) -> Parts:
        build = adaptive.chain(2, choose, adaptive.path(0.3))
        return Parts(model(pair.draft, build), pair.draft_params, rule())

    check = exactness.enumeration(factory, tabular_pair(3))
    assert check.passed, check.verdict


# -------------------------------------------------------------------------------------- best first


@pytest.mark.parametrize("choose", [grow.best(), WOR, IID], ids=["best", "wor", "iid"])
def test_the_best_nodes_of_every_level_branch(choose: grow.Choose) -> None:
    width, k, depth = 2, 3, 3
    build = adaptive.best_first(width, k, depth, choose)
    assert build.proposal.num_nodes == 1 + 3 + 6 + 6
    draft = grown(build)
    for row in range(ROWS):
        tokens, parents = np.asarray(draft.tokens)[row], np.asarray(draft.parents)[row]
        values, level = {0: 1.0}, [0]
        first = 1
        for d in range(1, depth + 1):
            chosen = sorted(level, key=lambda i: -values[i])[: width if d > 1 else 1]
            level = list(range(first, first + k * len(chosen)))
            first = level[-1] + 1
            assert sorted(parents[level]) == sorted(np.repeat(chosen, k))
            for i in level:
                parent = parents[i]
                values[i] = values[parent] * float(LAW[tokens[parent]][tokens[i]])
        assert first == build.proposal.num_nodes
    if choose.law == "point":
        assert draft.probs is None
        assert set(np.asarray(draft.tokens)[0, 1:4]) == set(np.argsort(-LAW[ROOTS[0]])[:3])


@pytest.mark.parametrize(
    ("choose", "rule"),
    [
        (WOR, traversal),
        pytest.param(WOR, rejection, marks=pytest.mark.slow),
        pytest.param(IID, rejection, marks=pytest.mark.slow),
        pytest.param(grow.coupled(), match, marks=pytest.mark.slow),
    ],
)
def test_trees_that_follow_drawn_tokens_are_exact(choose: grow.Choose, rule: Any) -> None:
    def factory(pair: Pair) -> Parts:
        build = adaptive.best_first(1, 2, 2, choose)
        return Parts(model(pair.draft, build), pair.draft_params, rule())

    check = exactness.enumeration(factory, tabular_pair(3 if choose is WOR else 2))
    assert check.passed, check.verdict


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adaptive.confidence(1.5), "confidence .* 1.5; it must be between 0 and 1"),
        (lambda: adaptive.entropy(-1), "entropy .* -1; it must be at least 0"),
        (lambda: adaptive.path(2), "path .* 2; it must be between 0 and 1"),
        (lambda: adaptive.chain(0, WOR, adaptive.path(0.1)), "at most 0 tokens is empty"),
        (lambda: adaptive.best_first(3, 2, 2, WOR), "width 3 .* 2 children"),
        (lambda: adaptive.best_first(0, 2, 2, WOR), "width 0"),
        (lambda: adaptive.best_first(1, 2, 0, WOR), "depth 0"),
    ],
)
def test_impossible_builders_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
