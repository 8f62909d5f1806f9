"""Continuations as a tree, against dictionaries."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.drafters.trie import common_beginnings, frequencies, trie

ROWS, COUNT, DEPTH = 40, 7, 4


@pytest.fixture(scope="module")
def continuations() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (ROWS, COUNT, DEPTH)).astype(np.int32)
    return tokens, rng.integers(0, DEPTH + 1, (ROWS, COUNT)).astype(np.int32)


def counted(tokens: np.ndarray, length: np.ndarray) -> Counter[tuple[int, ...]]:
    """How many continuations begin with each string."""
    return Counter(
        tuple(row[: d + 1].tolist())
        for row, n in zip(tokens, length, strict=True)
        for d in range(n)
    )


def test_equal_beginnings_are_found(continuations: tuple[np.ndarray, np.ndarray]) -> None:
    tokens, length = continuations
    common = np.asarray(jax.jit(common_beginnings)(tokens, length))
    for b in range(ROWS):
        for i in range(COUNT):
            for j in range(COUNT):
                reach = min(length[b, i], length[b, j])
                differs = np.append(tokens[b, i, :reach] != tokens[b, j, :reach], True)
                assert common[b, i, j] == np.argmax(differs)


@pytest.mark.parametrize("num_nodes", [6, 1 + COUNT * DEPTH])
def test_the_most_frequent_strings_stay(
    continuations: tuple[np.ndarray, np.ndarray], num_nodes: int
) -> None:
    tokens, length = continuations
    root = np.full((ROWS, 1), 2, np.int32)
    budget = np.arange(ROWS, dtype=np.int32) % num_nodes

    @jax.jit
    def grow(tokens: jax.Array, length: jax.Array) -> tuple:
        common = common_beginnings(tokens, length)
        values = frequencies(common, DEPTH)
        draft = trie(jnp.asarray(root), tokens, common, values, num_nodes, jnp.asarray(budget))
        return draft.tokens, draft.parents, draft.num_drafted

    found = [np.asarray(x) for x in grow(tokens, length)]
    for b, (drafted, parents, count) in enumerate(zip(*found, strict=True)):
        expected = counted(tokens[b], length[b])
        assert count == min(budget[b], num_nodes - 1, len(expected))
        strings: list[tuple[int, ...]] = [()]
        for i in range(1, num_nodes):
            assert 0 <= parents[i] < i
            strings.append((*strings[parents[i]], int(drafted[i])))
        kept, fillers = strings[1 : count + 1], strings[count + 1 :]
        assert len(set(kept)) == count
        assert set(fillers) <= {(2,)}
        best = sorted(expected.values(), reverse=True)[:count]
        assert sorted((expected[string] for string in kept), reverse=True) == best
        assert parents[0] == -1
        assert drafted[0] == 2
