"""Verifiers by exact enumeration: every draft, every decision, no sampling error.

A statistical test misses faults below a few hundredths of total variation; here the limit is
float32. Random choices are replaced by prescribed ones, and the probabilities with which they would
have been made are recorded; summing over all of them gives the law of the output.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as caches
from specjax.sampling import sampling, shared_gumbel, streams
from specjax.types import Context, Draft, ModelOutput, Params, Verdict
from specjax.verifiers import rejection as rejection_module
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

EXACT = 1e-6  # total variation
ROWS = 1024

Strings = dict[tuple[int, ...], np.ndarray]  # the law [V] of what follows each string

# -------------------------------------------------------------------------------------- enumeration


class Spec(NamedTuple):
    """A tree and how each node's token comes about.

    kinds: of nodes 1 .. N - 1; "q" is drawn from the draft law, "w" from it without the elders'
        tokens, "best" is the likeliest untried token, a number is that token.
    """

    parents: tuple[int, ...]
    kinds: tuple[str | int, ...]
    vocab_size: int = 3
    depth: int | None = None  # nodes below are dead; by default none is
    holes: float = 0.0  # share of tokens that each law rules out


def random_laws(rng: np.random.Generator, vocab_size: int, depth: int, holes: float) -> Strings:
    """An uneven law after every string of up to `depth` tokens."""
    laws = {}
    for n in range(depth + 1):
        for string in itertools.product(range(vocab_size), repeat=n):
            law = rng.dirichlet(np.full(vocab_size, 0.7))
            law = np.where(rng.random(vocab_size) < holes, 0, law)
            laws[string] = law / law.sum() if law.sum() > 0.1 else np.eye(vocab_size)[len(laws) % 3]
    return laws


def depths(parents: tuple[int, ...]) -> list[int]:
    depth = [0]
    for p in parents[1:]:
        depth.append(depth[p] + 1)
    return depth


def string_of(parents: tuple[int, ...], tokens: list[int], i: int) -> tuple[int, ...]:
    """The tokens from below the root to node i."""
    return () if i == 0 else (*string_of(parents, tokens, parents[i]), tokens[i])


def one_hot(token: int, vocab_size: int) -> np.ndarray:
    return np.eye(vocab_size)[token]


def drafts(spec: Spec, q: Strings) -> Iterator[tuple[list[int], list[np.ndarray], float]]:
    """All drafts: tokens [N], their laws [N, V] and the probability of the whole."""

    def grow(
        tokens: list[int], laws: list[np.ndarray], weight: float
    ) -> Iterator[tuple[list[int], list[np.ndarray], float]]:
        i = len(tokens)
        if i == len(spec.parents):
            yield tokens, laws, weight
            return
        kind, parent = spec.kinds[i - 1], spec.parents[i]
        law = q[string_of(spec.parents, tokens, parent)]
        elders = [tokens[j] for j in range(1, i) if spec.parents[j] == parent]
        untried = np.where(np.isin(np.arange(spec.vocab_size), elders), 0, law)
        if isinstance(kind, int):
            law = one_hot(kind, spec.vocab_size)
        elif kind == "best" or (kind == "w" and untried.sum() == 0):
            rest = np.where(np.isin(np.arange(spec.vocab_size), elders), -1, law)
            law = one_hot(int(rest.argmax()), spec.vocab_size)
        elif kind == "w":
            law = untried / untried.sum()
        for token in np.flatnonzero(law):
            yield from grow([*tokens, int(token)], [*laws, law], weight * law[token])

    yield from grow([0], [np.zeros(spec.vocab_size)], 1.0)


class Outputs(NamedTuple):
    """The exact law of one verification."""

    law: np.ndarray  # [V ** (D + 1)], of the output continued by the target itself
    expected_nodes: float  # tokens gained


def enumerate_rejection(
    spec: Spec, p: Strings, q: Strings, monkeypatch: pytest.MonkeyPatch, reorder: bool = False
) -> Outputs:
    """Verifies every draft under every pattern of acceptances, one batch row each."""
    n, v = len(spec.parents), spec.vocab_size
    depth = max(depths(spec.parents)) if spec.depth is None else spec.depth
    decisions = np.array(list(itertools.product([True], *[[False, True]] * (n - 1))))
    found = [reordered(spec, *x) if reorder else x for x in drafts(spec, q)]
    tokens, laws, weight = (np.array(x) for x in zip(*found, strict=True))
    target = np.array([[p[string_of(spec.parents, x, i)] for i in range(n)] for x, _, _ in found])
    draft_of = np.repeat(np.arange(len(found)), len(decisions))
    pattern_of = np.tile(np.arange(len(decisions)), len(found))
    # Batches of one size, the last one padded with weight 0: operations are compiled once.
    padding = -len(draft_of) % ROWS
    draft_of, pattern_of = (np.pad(x, (0, padding)) for x in (draft_of, pattern_of))
    weight = np.where(np.arange(len(draft_of)) < len(draft_of) - padding, weight[draft_of], 0)
    points = all(kind == "best" or isinstance(kind, int) for kind in spec.kinds)
    joint, expected_nodes = np.zeros([v] * (depth + 1)), 0.0
    for rows in np.arange(len(draft_of)).reshape(-1, ROWS):
        draft = Draft(
            tokens=jnp.asarray(tokens[draft_of[rows]], jnp.int32),
            parents=jnp.asarray(np.tile(spec.parents, (ROWS, 1)), jnp.int32),
            probs=None if points else jnp.asarray(laws[draft_of[rows]], jnp.float32),
            num_drafted=jnp.full([ROWS], n - 1),
            depth=depth,
        )
        verdict, chance, residual = prescribed(
            draft, target[draft_of[rows]], decisions[pattern_of[rows]], spec, monkeypatch
        )
        path, count = np.asarray(verdict.path), np.asarray(verdict.num_nodes)
        mass = weight[rows] * chance
        expected_nodes += float((mass * count).sum())
        assert path.shape == (ROWS, depth + 1)
        for b in np.flatnonzero(mass):
            way = path[b, : count[b]].tolist()
            assert [spec.parents[i] for i in way] == [-1, *way[:-1]], "a path from the root down"
            string = tuple(np.asarray(draft.tokens)[b, way[1:]].tolist())
            joint[string] += mass[b] * rest_of(
                p, string, depth + 1 - len(string), v, residual[b] / residual[b].sum()
            )
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    return Outputs(joint.reshape(-1), expected_nodes)


def prescribed(
    draft: Draft,
    target: np.ndarray,
    decisions: np.ndarray,
    spec: Spec,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Verdict, np.ndarray, np.ndarray]:
    """Runs the rule with prescribed acceptances.

    Args:
        target: [B, N, V], the target's laws.
        decisions: [B, N] bool, whether each node is to be accepted.

    Returns:
        The verdict, the probability [B] of these decisions, and the weights [B, V] from which the
        next token would have been drawn.
    """
    n = len(spec.parents)
    probability, residual = np.ones(len(target)), []

    def bernoulli(
        rng_keys: Any, context: Any, site: str, probs: jax.Array, index: Any = 0
    ) -> jax.Array:
        chance = np.clip(np.asarray(probs, np.float64), 0, 1)
        assert np.isfinite(chance).all()
        if chance.shape[1] == n - 1:  # a chain: all nodes at once
            child_of = {i - 1: i for i in range(1, n)}
        else:  # a tree: the index-th child of every node
            kids = {j: [i for i in range(1, n) if spec.parents[i] == j] for j in range(n)}
            child_of = {j: k[int(index)] for j, k in kids.items() if len(k) > int(index)}
        came_true = np.zeros(chance.shape, bool)
        for place, child in child_of.items():
            came_true[:, place] = decisions[:, child]
            probability[:] *= np.where(decisions[:, child], chance[:, place], 1 - chance[:, place])
        return jnp.asarray(came_true)

    def categorical(rng_keys: Any, context: Any, site: str, log_weights: jax.Array) -> jax.Array:
        residual.append(np.exp(np.asarray(log_weights, np.float64)))
        return jnp.zeros(len(log_weights), jnp.int32)

    monkeypatch.setattr(rejection_module, "bernoulli", bernoulli)
    monkeypatch.setattr(rejection_module, "categorical", categorical)
    warped = jnp.asarray(np.log(target, where=target > 0, out=np.full_like(target, -np.inf)))
    output = ModelOutput(warped, warped)
    with jax.disable_jit():  # loops run in Python, where decisions can be prescribed
        verdict = rejection().verify(Params(()), None, None, draft, output, warped)
    assert len(residual) == 1
    return verdict, probability, residual[0]


def rest_of(
    p: Strings,
    string: tuple[int, ...],
    n: int,
    vocab_size: int,
    first: np.ndarray | None = None,
) -> np.ndarray:
    """The joint law [V, ... n times] of what follows `string`, the first of it drawn from `first`
    and the rest by the target."""
    if n == 0:
        return np.ones(())
    law = p[string] if first is None else first
    rest = [rest_of(p, (*string, t), n - 1, vocab_size) for t in range(vocab_size)]
    return np.stack([law[t] * rest[t] for t in range(vocab_size)])


def reordered(
    spec: Spec, tokens: list[int], laws: list[np.ndarray], weight: float
) -> tuple[list[int], list[np.ndarray], float]:
    """The same draft, siblings (all of them leaves) sorted by token."""
    order = sorted(range(1, len(tokens)), key=lambda i: (spec.parents[i], tokens[i]))
    return [0, *(tokens[i] for i in order)], [laws[0], *(laws[i] for i in order)], weight


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(abs(a - b).sum() / 2)


# ---------------------------------------------------------------------------------------- rejection

CHAIN = (-1, 0, 1)
BUSHY = (-1, 0, 0, 1, 1, 2, 2)
SIBLINGS = (-1, 0, 0, 0)
UNEVEN = (-1, 0, 0, 1, 1)
SPECS = {
    "root alone": Spec((-1,), (), 4),
    "chain": Spec(CHAIN, ("q", "q"), 4),
    "chain with holes": Spec(CHAIN, ("q", "q"), 4, holes=0.5),
    "chain of points": Spec(CHAIN, ("best", 2), 4),
    "chain, point then sampled": Spec(CHAIN, (1, "q"), 4),
    "siblings without replacement": Spec(SIBLINGS, ("w", "w", "w"), 4),
    "all siblings there are": Spec(SIBLINGS, ("w", "w", "w")),
    "siblings with holes": Spec(SIBLINGS, ("w", "w", "w"), 4, holes=0.5),
    "independent siblings": Spec(SIBLINGS, ("q", "q", "q"), 4),
    "tree without replacement": Spec(BUSHY, ("w",) * 6),
    "tree with holes": Spec(BUSHY, ("w",) * 6, holes=0.4),
    "tree of points": Spec(BUSHY, ("best",) * 6),
    "point beside sampled": Spec((-1, 0, 0, 0, 1, 1, 2), ("best", "w", "q", 0, "q", 1)),
    "uneven tree": Spec(UNEVEN, ("w",) * 4),
    "independent tree": Spec(UNEVEN, ("q",) * 4, holes=0.2),
    "independent paths": Spec((-1, 0, 0, 1, 2), ("q",) * 4),
    "repeated points": Spec((-1, 0, 0, 1, 2), (1, 1, 0, 2)),
    "sampled beside point": Spec(UNEVEN, ("q", 1, "q", 2)),
    "dead nodes": Spec(UNEVEN, ("w",) * 4, depth=1),
}


@pytest.mark.parametrize("name", SPECS)
def test_rejection_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    rng = np.random.default_rng(len(name))
    depth = max(depths(spec.parents))
    p = random_laws(rng, spec.vocab_size, depth, spec.holes)
    q = random_laws(rng, spec.vocab_size, depth, spec.holes)
    outputs = enumerate_rejection(spec, p, q, monkeypatch)
    horizon = (depth if spec.depth is None else spec.depth) + 1
    expected = rest_of(p, (), horizon, spec.vocab_size).reshape(-1)
    assert total_variation(outputs.law, expected) < EXACT
    assert outputs.expected_nodes > 1 or depth == 0


def test_enumeration_finds_sorted_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    spec = SPECS["siblings without replacement"]
    p, q = (random_laws(rng, 4, 1, 0) for _ in range(2))
    outputs = enumerate_rejection(spec, p, q, monkeypatch, reorder=True)
    assert total_variation(outputs.law, rest_of(p, (), 2, 4).reshape(-1)) > 0.01


@pytest.mark.parametrize(("depth", "accepted"), [(2, 10 / 9), (3, 1.40741), (4, 1.60494)])
def test_rejection_accepts_as_often_as_it_should(
    depth: int, accepted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of arXiv 2403.10444: p = (1/3, 2/3), q = (2/3, 1/3), context-free."""
    strings = [x for n in range(depth + 1) for x in itertools.product(range(2), repeat=n)]
    p = {x: np.array([1, 2]) / 3 for x in strings}
    q = {x: np.array([2, 1]) / 3 for x in strings}
    spec = Spec(tuple(range(-1, depth)), ("q",) * depth, 2)
    outputs = enumerate_rejection(spec, p, q, monkeypatch)
    assert outputs.expected_nodes - 1 == pytest.approx(accepted, abs=1e-5)


# -------------------------------------------------------------------------------------------- match


def test_match_walks_the_tree() -> None:
    """Random trees with repeated siblings, greedy rows among sampled ones, dead nodes."""
    rng = np.random.default_rng(0)
    rows, n, v, depth = 500, 10, 3, 3
    parents = np.array([[-1] + [rng.integers(max(i - 3, 0), i) for i in range(1, n)]] * rows)
    for b in range(rows):
        parents[b, 1:] = [rng.integers(max(i - 3, 0), i) for i in range(1, n)]
    tokens = rng.integers(0, v, (rows, n))
    weights = rng.normal(scale=2, size=(rows, n, v)).astype(np.float32)
    temperature = rng.choice([0.0, 1.0], rows)
    greedy = np.where(np.eye(v, dtype=bool)[weights.argmax(-1)], 0, -np.inf)
    warped = np.where(temperature[:, None, None] == 0, greedy, weights).astype(np.float32)
    length = rng.integers(1, 30, rows)
    rng_keys = streams(jax.random.split(jax.random.key(0), rows))
    context = Context(
        tokens=jnp.zeros((rows, 40), jnp.int32),
        length=jnp.asarray(length, jnp.int32),
        limit=jnp.full([rows], 40),
        cache=caches.empty(1, (rows, 1, 40, 2)),
        sampling=sampling(rows, temperature),
    )
    draft = Draft(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(parents, jnp.int32),
        None,
        jnp.full([rows], n - 1),
        depth,
    )
    output = ModelOutput(jnp.asarray(warped), jnp.asarray(warped))
    verdict = jax.jit(match().verify)(Params(()), rng_keys, context, draft, output, output.logits)
    noise = np.asarray(shared_gumbel(rng_keys, jnp.asarray(length[:, None] + np.arange(n)), v))

    gained = []
    for b in range(rows):
        node_depth = depths(tuple(parents[b]))
        emitted = [(warped[b, i] + noise[b, node_depth[i]]).argmax() for i in range(n)]
        if temperature[b] == 0:
            emitted = warped[b].argmax(-1).tolist()

        def walk(node: int, way: list[int], b: int = b, emitted: Any = emitted) -> list[int]:
            """The longest way on from `node`, the first one of several."""
            best = way
            for child in range(n) if len(way) <= depth else ():
                if parents[b, child] == node and tokens[b, child] == emitted[node]:
                    longer = walk(child, [*way, child])
                    if (len(longer), -longer[-1]) > (len(best), -best[-1]):
                        best = longer
            return best

        way = walk(0, [0])
        gained.append(len(way))
        assert verdict.num_nodes[b] == len(way)
        assert verdict.path[b].tolist() == way + [0] * (depth + 1 - len(way))
        assert verdict.next_token[b] == emitted[way[-1]]
    assert set(gained) == {1, 2, 3, 4}
