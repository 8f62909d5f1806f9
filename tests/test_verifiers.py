"""`match` against a walk by hand; all rules by enumeration are in `test_exactness.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import cache as caches
from specjax.sampling import sampling, shared_gumbel, streams
from specjax.types import Context, Draft, ModelOutput, Params
from specjax.verifiers.match import match


def depths(parents: tuple[int, ...]) -> list[int]:
    depth = [0]
    for p in parents[1:]:
        depth.append(depth[p] + 1)
    return depth


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
