"""Trees derived from `parents`, against walking them node by node."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as caches
from specjax import trees
from specjax.sampling import sampling
from specjax.types import Context, Draft

NUM_TREES = 300


def random_parents(rng: np.random.Generator, n: int) -> np.ndarray:
    """Parents precede children; half of the trees lean towards long paths."""
    oldest = [0 if rng.random() < 0.5 else max(i - 2, 0) for i in range(n)]
    return np.array([-1] + [rng.integers(oldest[i], i) for i in range(1, n)], np.int32)


def ancestors(parents: np.ndarray, i: int) -> list[int]:
    """From node i up to the root."""
    found = [i]
    while parents[found[-1]] >= 0:
        found.append(int(parents[found[-1]]))
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 17])
def test_ancestors_and_depths(n: int) -> None:
    rng = np.random.default_rng(n)
    parents = np.stack([random_parents(rng, n) for _ in range(NUM_TREES)])
    parents[0] = np.arange(n) - 1  # a chain needs the most rounds
    mask = np.asarray(trees.ancestor_mask(jnp.asarray(parents)))
    expected = np.zeros((NUM_TREES, n, n), bool)
    for t in range(NUM_TREES):
        for i in range(n):
            expected[t, i, ancestors(parents[t], i)] = True
    np.testing.assert_array_equal(mask, expected)
    depth = [[len(ancestors(p, i)) - 1 for i in range(n)] for p in parents]
    np.testing.assert_array_equal(trees.depths(jnp.asarray(mask)), depth)
    np.testing.assert_array_equal(trees.ancestor_mask(jnp.asarray(parents[-1])), mask[-1])


@pytest.mark.parametrize(("n", "depth"), [(1, 0), (2, 1), (8, 2), (8, 7), (13, 4)])
def test_deepest(n: int, depth: int) -> None:
    rng = np.random.default_rng(100 * n + depth)
    parents = np.stack([random_parents(rng, n) for _ in range(NUM_TREES)])
    agrees = rng.random((NUM_TREES, n)) < 0.7
    agrees[:, 0] = True
    mask = trees.ancestor_mask(jnp.asarray(parents))
    last, path, count = map(np.asarray, trees.deepest(jnp.asarray(agrees), mask, depth))
    assert path.shape == (NUM_TREES, depth + 1)
    for t in range(NUM_TREES):
        best = [0]
        for i in range(n):
            way = ancestors(parents[t], i)[::-1]
            if agrees[t, way].all() and len(best) < len(way) <= depth + 1:
                best = way
        assert last[t] == best[-1]
        assert count[t] == len(best)
        assert path[t].tolist() == best + [0] * (depth + 1 - len(best))


def test_topology_unfolds() -> None:
    t = trees.topology((-1, 0, 0, 1, 1, 2, 4))
    assert t.depth_of.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert t.rank.tolist()[1:] == [0, 1, 0, 1, 0, 0]
    assert [level.tolist() for level in t.levels] == [[0], [1, 2], [3, 4, 5], [6]]
    assert (t.depth, t.is_chain) == (3, False)
    np.testing.assert_array_equal(t.mask, trees.ancestor_mask(jnp.asarray(t.parents)))
    assert trees.topology((-1, 0, 1)).is_chain
    assert trees.topology((-1,)).depth == 0


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((), "must start with its root"),
        ((0, 0), "must start with its root"),
        ((-1, -1), "Node 1 of tree .* has parent -1; it needs one of 0 to 0"),
        ((-1, 1), "Node 1 of tree .* has parent 1; it needs one of 0 to 0"),
        ((-1, 0, 3), "Node 2 of tree .* has parent 3; it needs one of 0 to 1"),
        ((-1, 0, 1, 0), "Node 3 of tree .* has depth 1 but follows one of depth 2"),
    ],
)
def test_topology_refuses(parents: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trees.topology(parents)


def test_chain() -> None:
    tokens = jnp.asarray([[3, 1, 2], [0, 0, 4]])
    draft = trees.chain(tokens)
    assert (draft.depth, draft.probs) == (2, None)
    np.testing.assert_array_equal(draft.parents, [[-1, 0, 1]] * 2)
    np.testing.assert_array_equal(draft.num_drafted, [2, 2])
    np.testing.assert_array_equal(trees.chain(tokens, None, jnp.array([0, 2])).num_drafted, [0, 2])


def test_node_probs() -> None:
    draft = trees.chain(jnp.asarray([[3, 1, 2]]))
    np.testing.assert_array_equal(trees.node_probs(draft, 4)[0], np.eye(4)[[3, 1, 2]])
    probs = jnp.full((1, 3, 4), 0.25)
    sampled: Draft = draft.replace(probs=probs)
    np.testing.assert_array_equal(trees.node_probs(sampled, 4), probs)


def test_root_is_the_pending_token() -> None:
    context = Context(
        tokens=jnp.asarray([[5, 6, 7], [5, 6, 7]]),
        length=jnp.array([1, 3]),
        limit=jnp.array([3, 3]),
        cache=caches.empty(1, (2, 1, 3, 2)),
        sampling=sampling(2),
    )
    np.testing.assert_array_equal(trees.root(context), [[5], [7]])


@pytest.mark.parametrize("own", [(-1, 0, 1, 2), (-1, 0, 0, 1, 1, 2, 4), (-1,)])
def test_nodes_are_located_by_their_strings(own: tuple[int, ...]) -> None:
    """In drafts of other shapes, duplicates and nodes of no tree included."""
    rng = np.random.default_rng(len(own))
    n, m, tree = 9, len(own), trees.topology(own)
    parents = np.stack([random_parents(rng, n) for _ in range(NUM_TREES)])
    parents[:, -1] = np.where(rng.random(NUM_TREES) < 0.3, -1, parents[:, -1])
    tokens = rng.integers(0, 2, (NUM_TREES, n)).astype(np.int32)
    mine = rng.integers(0, 2, (NUM_TREES, m)).astype(np.int32)
    mine[:, 0] = tokens[:, 0]
    draft = Draft(
        jnp.asarray(tokens), jnp.asarray(parents), None, jnp.zeros(NUM_TREES), depth=n - 1
    )
    found = np.asarray(trees.locate(draft, jnp.asarray(mine), tree))
    for t in range(NUM_TREES):
        spelt = [[tokens[t, i] for i in ancestors(parents[t], j)] for j in range(n)]
        in_tree = [0 in ancestors(parents[t], j) for j in range(n)]
        for i in range(m):
            string = [mine[t, j] for j in ancestors(tree.parents, i)]
            equal = [j for j in range(n) if spelt[j] == string and in_tree[j]]
            assert found[t, i] == (equal[0] if equal else -1)
