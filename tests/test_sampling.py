"""Warping against a reference that sorts; draws that depend on what they should, and only that."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as caches
from specjax import sampling as samplers
from specjax.kernels.vocabulary import argmax
from specjax.types import Array, Context, Keys

VOCAB_SIZE = 11


def warp_by_sorting(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """One row of logits [V] -> the law [V]; equal logits are kept or cut together."""
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    if top_k > 0:
        p = np.where(x >= np.sort(x)[::-1][min(top_k, len(x)) - 1], p, 0)
    if top_p < 1:
        mass = np.sort(p)[::-1].cumsum()
        smallest = np.sort(p)[::-1][(mass < top_p * p.sum()).sum()]
        p = np.where(p >= smallest, p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
    return p / p.sum()


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy ignores cuts": {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k 1": {"temperature": 1.0, "top_k": 1},
    "top_k": {"temperature": 0.7, "top_k": 4},
    "top_k of all": {"temperature": 1.0, "top_k": VOCAB_SIZE},
    "top_k beyond all": {"temperature": 1.0, "top_k": 10**6},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_p 0": {"temperature": 1.0, "top_p": 0.0},
    "small top_p": {"temperature": 1.5, "top_p": 0.1},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "min_p 1": {"temperature": 1.0, "min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
}
OFF = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def rows_of_logits(seed: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(n, VOCAB_SIZE)).astype(np.float32)
    logits[::3, ::2] = logits[::3, :1]  # ties, at the cut of some rows
    logits[1] = 0.0
    logits[2, 4] = -np.inf
    return logits


def laws(logits: np.ndarray, sampling: Any) -> np.ndarray:
    return np.asarray(jax.nn.softmax(jax.jit(samplers.warp)(logits, sampling)))


@pytest.mark.parametrize("name", SETTINGS)
def test_warp_in_a_uniform_batch(name: str) -> None:
    setting = OFF | SETTINGS[name]
    logits = rows_of_logits(len(name), 40)
    expected = np.stack([warp_by_sorting(x, **setting) for x in logits])
    actual = laws(logits.reshape(4, 10, -1), samplers.sampling(4, **setting))
    np.testing.assert_allclose(actual.reshape(40, -1), expected, atol=1e-6)
    np.testing.assert_array_equal(actual.reshape(40, -1) > 0, expected > 0)


def test_warp_in_a_mixed_batch() -> None:
    """Every row follows its own parameters, to the bit, whatever the others do."""
    settings = [OFF | x for x in SETTINGS.values()]
    logits = np.broadcast_to(rows_of_logits(5, 20), (len(settings), 20, VOCAB_SIZE))
    columns = {k: np.array([x[k] for x in settings]) for k in OFF}
    mixed = jax.jit(samplers.warp)(logits, samplers.sampling(len(settings), **columns))
    for i, setting in enumerate(settings):
        alone = jax.jit(samplers.warp)(logits[i : i + 1], samplers.sampling(1, **setting))
        np.testing.assert_array_equal(mixed[i], alone[0])


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = jnp.array([[[1.0, 3.0, 3.0, 2.0]]])
    warped = samplers.warp(logits, samplers.sampling(1))
    np.testing.assert_array_equal(warped[0, 0], [-np.inf, 0, -np.inf, -np.inf])
    assert argmax(logits)[0, 0] == 1
    assert argmax(jnp.full((2, 5), -jnp.inf)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": [1.0, float("nan")]}, "temperature is .*; it must be at least 0"),
        ({"top_k": -1}, "top_k is -1; it must be at least 0"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be from 0 to 1"),
        ({"min_p": 1.01}, "min_p is 1.01; it must be from 0 to 1"),
        ({"min_p": -0.5}, "min_p is -0.5; it must be from 0 to 1"),
        ({"temperature": [1.0, 1.0, 1.0]}, r"temperature has shape \(3,\) for 2 row"),
        ({"top_p": [[1.0, 1.0]]}, r"top_p has shape \(1, 2\) for 2 row"),
    ],
)
def test_sampling_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samplers.sampling(2, **arguments)


# --------------------------------------------------------------------------------------- randomness


def keys(n: int, seed: int = 0) -> Keys:
    return samplers.streams(jax.random.split(jax.random.key(seed), n))


def context(length: list[int]) -> Context:
    b = len(length)
    return Context(
        tokens=jnp.zeros((b, 9), jnp.int32),
        length=jnp.array(length),
        limit=jnp.full([b], 9),
        cache=caches.empty(1, (b, 1, 9, 2)),
        sampling=samplers.sampling(b, 1.0),
    )


def bits(rng_keys: Array) -> list[tuple[int, ...]]:
    return [tuple(row) for row in np.asarray(jax.random.key_data(rng_keys)).tolist()]


def test_shared_noise_belongs_to_row_and_position() -> None:
    some = keys(3)
    grid = samplers.shared_gumbel(some, jnp.array([[4, 5], [5, 6], [0, 4]]), VOCAB_SIZE)
    assert grid.shape == (3, 2, VOCAB_SIZE)
    flat = samplers.shared_gumbel(some, jnp.array([5, 5, 4]), VOCAB_SIZE)
    np.testing.assert_array_equal(flat, [grid[0, 1], grid[1, 0], grid[2, 1]])
    reordered = jax.tree.map(lambda x: x[jnp.array([2, 0])], some)
    other_batch = samplers.shared_gumbel(reordered, jnp.array([[[4]], [[5]]]), VOCAB_SIZE)
    np.testing.assert_array_equal(other_batch[:, 0, 0], [grid[2, 1], grid[0, 1]])
    different = np.asarray(grid).reshape(6, -1)
    assert len(np.unique(different, axis=0)) == 6


def test_private_keys_differ_by_row_root_site_index_and_stream() -> None:
    some = keys(2)
    found = [
        *bits(some.shared),
        *bits(some.private),
        *bits(samplers.private_keys(some, context([3, 3]), "a")),
        *bits(samplers.private_keys(some, context([4, 4]), "a")),
        *bits(samplers.private_keys(some, context([3, 3]), "b")),
        *bits(samplers.private_keys(some, context([3, 3]), "a", 1)),
    ]
    assert len(set(found)) == len(found)
    again = samplers.private_keys(some, context([3, 4]), "a", jnp.int32(0))
    assert bits(again) == [found[4], found[7]]


def test_draws_follow_their_laws() -> None:
    """Frequencies within five standard errors."""
    n = 20000
    some, where = keys(n, seed=1), context([2] * n)
    weights = jnp.log(jnp.array([0.5, 0.0, 0.2, 0.3]))
    drawn = samplers.categorical(some, where, "site", jnp.broadcast_to(weights, (n, 4)))
    share = np.bincount(drawn, minlength=4) / n
    assert share[1] == 0
    np.testing.assert_allclose(share, [0.5, 0, 0.2, 0.3], atol=5 * 0.5 / n**0.5)
    probs = jnp.broadcast_to(jnp.array([0.0, 0.3, 1.0, 1.7]), (n, 4))
    came_true = np.asarray(samplers.bernoulli(some, where, "site", probs))
    np.testing.assert_allclose(came_true.mean(0), [0, 0.3, 1, 1], atol=5 * 0.5 / n**0.5)
    assert not came_true[:, 0].any()
    assert came_true[:, 2:].all()
    noise = samplers.private_noise(some, where, "site", (2, 3))
    assert noise.shape == (n, 2, 3)
    np.testing.assert_allclose(noise.mean(0), np.euler_gamma, atol=5 * 1.3 / n**0.5)
