"""Dynamic trees against enumeration: which candidates stay, and that they are fed as what they are.

Trees of a fixed shape are covered by the laws.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draft_model, target

from specjax import cache as caches
from specjax import engine
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.models.transformer import forward
from specjax.sampling import RANDOM, sampling
from specjax.types import Array, Context, Draft, Keys, Params
from specjax.verifiers.match import match

STATES = 97
KEYS = Keys(jnp.zeros(()), jnp.zeros(()), draws=RANDOM)  # of no use: nothing is drawn
Path = tuple[int, ...]
Law = Callable[[Path], np.ndarray]  # log-probabilities of the token that follows


def context(roots: list[int]) -> Context:
    """Rows whose only token is the root."""
    b = len(roots)
    return Context(
        jnp.asarray(roots, jnp.int32)[:, None],
        jnp.ones([b], jnp.int32),
        jnp.full([b], 9, jnp.int32),
        caches.empty(0, (b, 1, 0, 1), jnp.float32),
        sampling(b, 0.0),
    )


class Oracle:
    """Random laws, each named by a sum over the path that leads there."""

    def __init__(self, vocab_size: int, depth: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 2, (STATES, vocab_size)).astype(np.float32)
        self.code = rng.integers(0, STATES, (depth + 1, vocab_size)).astype(np.int32)

    def law(self, root: int) -> Law:
        def law(path: Path) -> np.ndarray:
            name = sum(self.code[i, token] for i, token in enumerate((root, *path)))
            return log_softmax(self.table[name % STATES])

        return law

    def grow(self, build: grow.Builder, roots: list[int]) -> Draft:
        """With an `expand` that reads ancestors off the mask, and NaN where parents disagree."""
        at = jnp.asarray(self.code[0, roots])[:, None]

        def expand(
            carry: Any, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Any]:
            codes, above = carry
            code = jnp.asarray(self.code)[depth, tokens]
            codes = jnp.concatenate([codes, code], 1)
            assert mask.shape == (*tokens.shape, codes.shape[1])
            name = at + (mask * codes[:, None]).sum(-1)
            agrees = name == jnp.take_along_axis(above, parents, 1) + code
            logits = jnp.asarray(self.table)[name % STATES]
            return jnp.where(agrees[..., None], logits, jnp.nan), (codes, name)

        logits = jnp.asarray(self.table)[at[:, 0] % STATES]
        return build.grow(expand, KEYS, context(roots), logits, (at[:, :0], at))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def beam(law: Law, width: int, depth: int) -> dict[Path, float]:
    """All candidates, level by level, with their values."""
    values: dict[Path, float] = {}
    level: dict[Path, float] = {(): 0.0}
    for _ in range(depth):
        level = {
            (*path, int(token)): value + law(path)[token]
            for path, value in sorted(level.items(), key=lambda x: -x[1])[:width]
            for token in np.argsort(-law(path))[:width]
        }
        values |= level
    return values


def paths_of(draft: Draft, row: int) -> list[Path]:
    """The string of every node, the root's being empty."""
    tokens, parents = np.asarray(draft.tokens)[row], np.asarray(draft.parents)[row]
    paths: list[Path] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        assert 0 <= parent < len(paths), "parents precede their children"
        paths.append((*paths[parent], int(token)))
    assert parents[0] == -1
    assert len(set(paths)) == len(paths)
    return paths


def best(values: dict[Path, float], count: int) -> list[Path]:
    return [(), *sorted(values, key=lambda path: -values[path])[:count]]


@pytest.mark.parametrize(("num_nodes", "width", "depth"), [(12, 3, 4), (4, 1, 3), (53, 4, 4)])
def test_the_best_candidates_stay(num_nodes: int, width: int, depth: int) -> None:
    oracle, roots = Oracle(6, depth, seed=num_nodes), [0, 3, 3, 5]
    build = grow.dynamic(num_nodes, width, depth)
    draft = jax.jit(lambda: oracle.grow(build, roots))()
    shapes = set()
    for row, root in enumerate(roots):
        values = beam(oracle.law(root), width, depth)
        assert paths_of(draft, row) == best(values, num_nodes - 1)
        shapes.add(tuple(np.asarray(draft.parents)[row]))
    np.testing.assert_array_equal(draft.tokens[:, 0], roots)
    np.testing.assert_array_equal(draft.num_drafted, num_nodes - 1)
    assert draft.probs is None
    assert draft.depth == depth
    assert build.proposal == ("point", num_nodes, depth)
    assert (len(shapes) > 1) == (width > 1), "shapes differ where there is a choice"


def subtrees(vocab_size: int, count: int, depth: int) -> Iterator[frozenset[Path]]:
    """All sets of strings with all their prefixes, of `count` strings at most `depth` long."""
    root: Path = ()
    found = {frozenset({root})}
    for _ in range(count):
        found = {
            tree | {(*path, token)}
            for tree in found
            for path in tree
            for token in range(vocab_size)
            if len(path) < depth and (*path, token) not in tree
        }
    return iter(found)


def test_wide_trees_are_the_best_of_all() -> None:
    """A level as wide as the tree keeps all that could matter: no subtree has a larger sum."""
    oracle, roots = Oracle(4, 3, seed=0), [0, 1, 2, 3]
    draft = jax.jit(lambda: oracle.grow(grow.dynamic(5, 4, 3), roots))()
    for row, root in enumerate(roots):
        law = oracle.law(root)

        def value(path: Path, law: Law = law) -> float:
            return float(np.exp(sum(law(path[:i])[token] for i, token in enumerate(path))))

        sums = {tree: sum(map(value, tree)) for tree in subtrees(4, 4, 3)}
        assert len(sums) == 713
        assert set(paths_of(draft, row)) == max(sums, key=lambda tree: sums[tree])


def test_equal_values_keep_parents() -> None:
    """Laws that are certain, or uniform, or impossible: every tree still is one."""
    for logits in ([9e9, -9e9, -9e9], [0.0, 0.0, 0.0], [0.0, -jnp.inf, -jnp.inf]):

        def expand(
            carry: Any, tokens: Array, *_: Any, logits: list[float] = logits
        ) -> tuple[Array, Any]:
            return jnp.broadcast_to(jnp.asarray(logits), (*tokens.shape, 3)), carry

        start = jnp.asarray([logits, logits])
        for build in (grow.dynamic(6, 2, 4), grow.dynamic(9, 3, 3)):
            draft = jax.jit(
                lambda build=build, expand=expand, start=start: build.grow(
                    expand, KEYS, context([0, 1]), start, None
                )
            )()
            lengths = [len(path) for path in paths_of(draft, 0)]
            assert max(lengths) == (build.proposal.depth if logits[0] > logits[1] else 2)


def test_a_model_is_fed_a_tree_that_differs_by_row() -> None:
    """Against the draft model's uncached laws; a static tree of the same shape says the same."""
    draft_net, weights = draft_model()
    target_net, target_weights = target()
    build = grow.dynamic(9, 3, 4)
    drafter = model(draft_net, build)
    decoder = engine.decoder(target_net, drafter, match())
    params = Params(target_weights, weights)
    rng = np.random.default_rng(0)
    prompt, length = rng.integers(0, 5, (3, 6)).astype(np.int32), np.array([6, 2, 4])
    state = engine.prefill(
        decoder,
        params,
        jax.random.split(jax.random.key(0), 3),
        sampling(3, (0.0, 1.0, 0.3)),
        prompt,
        length,
        np.full(3, 16),
        16,
    )

    def propose(build: grow.Builder) -> Draft:
        return model(draft_net, build).propose(
            params, state.rng_keys, state.drafter, state.context
        )[0]

    draft = jax.jit(lambda: propose(build))()
    uncached = jax.jit(lambda tokens: forward(draft_net, weights, tokens).logits)
    for row in range(3):
        history = prompt[row, : length[row]]

        def law(path: Path, history: np.ndarray = history) -> np.ndarray:
            tokens = np.zeros((1, 16), np.int32)
            n = len(history) + len(path)
            tokens[0, :n] = [*history, *path]
            return log_softmax(np.asarray(uncached(tokens))[0, n - 1])

        found = paths_of(draft, row)
        assert found == best(beam(law, 3, 4), 8)
        if row == 0:
            level_by_level = sorted(found, key=len)
            parents = [-1, *(level_by_level.index(path[:-1]) for path in level_by_level[1:])]
            fixed = jax.jit(lambda parents=parents: propose(grow.static(parents, grow.best())))()
            assert set(paths_of(fixed, row)) == set(found)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((22, 4, 2), "22 nodes .* 20 candidates .* 4 to 21 nodes"),
        ((4, 2, 3), "4 nodes .* 10 candidates .* 5 to 11 nodes"),
        ((5, 1, 3), "5 nodes .* 3 candidates .* 4 to 4 nodes"),
        ((5, 0, 3), "width 0 and depth 3"),
        ((2, 1, 0), "width 1 and depth 0"),
    ],
)
def test_impossible_sizes_are_refused(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grow.dynamic(*size)


def test_a_level_cannot_be_wider_than_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"Width 7 .* vocabulary of 6"):
        Oracle(6, 2, seed=0).grow(grow.dynamic(9, 7, 2), [0])


def test_no_vocabulary_is_sorted() -> None:
    """XLA on CPU finds the largest few in one pass, if it recognises that they are asked for."""
    oracle = Oracle(64, 3, seed=0)
    compiled = jax.jit(lambda: oracle.grow(grow.dynamic(12, 3, 3), [0, 1])).lower().compile()
    assert " sort(" not in str(compiled.as_text())
