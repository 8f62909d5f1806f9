"""The writers of history, against loops over rows and slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import cache as caches
from specjax.types import Block, Cache

ROWS, SLOTS, PATH, NODES = 64, 7, 4, 6


def random_writes(seed: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Starts and counts, beyond the buffer's end and of nothing at all among them."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, SLOTS + 3, ROWS)
    count = rng.integers(0, PATH + 1, ROWS)
    assert {0, PATH} <= set(count)
    assert ((start < SLOTS) & (start + count > SLOTS)).any()
    assert ((start >= SLOTS) & (count > 0)).any()
    return rng, start.astype(np.int32), count.astype(np.int32)


@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_write(rest: tuple[int, ...], dtype: jnp.dtype) -> None:
    rng, start, count = random_writes(len(rest))
    buffer = rng.integers(0, 99, (ROWS, SLOTS, *rest)).astype(dtype)
    values = rng.integers(100, 199, (ROWS, PATH, *rest))
    expected = buffer.copy()
    for b in range(ROWS):
        for i in range(count[b]):
            if start[b] + i < SLOTS:
                expected[b, start[b] + i] = values[b, i]
    written = jax.jit(caches.write)(buffer, values, start, count)
    assert written.dtype == dtype
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_commit(dtype: jnp.dtype) -> None:
    rng, length, count = random_writes(7)
    length = np.minimum(length, SLOTS)
    path = rng.integers(0, NODES, (ROWS, PATH)).astype(np.int32)

    def layers(width: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(rng.normal(size=(ROWS, 2, width, 3)), dtype) for _ in range(2))

    cache = Cache(layers(SLOTS), layers(SLOTS), jnp.asarray(length))
    positions = jnp.zeros((ROWS, NODES), jnp.int32)
    block = Block(layers(NODES), layers(NODES), positions)
    after = jax.jit(caches.commit)(cache, block, path, count)
    np.testing.assert_array_equal(after.length, np.minimum(length + count, SLOTS))
    for old, new, fed in zip(
        cache.keys + cache.values,
        after.keys + after.values,
        block.keys + block.values,
        strict=True,
    ):
        expected = np.array(old)
        for b in range(ROWS):
            for i in range(count[b]):
                if length[b] + i < SLOTS:
                    expected[b, :, length[b] + i] = np.asarray(fed)[b, :, path[b, i]]
        assert new.dtype == dtype
        np.testing.assert_array_equal(np.asarray(new), expected)


def test_truncate_only_shortens() -> None:
    cache = caches.empty(2, (3, 1, SLOTS, 2)).replace(length=jnp.array([0, 3, SLOTS]))
    shorter = caches.truncate(cache, jnp.array([2, 2, SLOTS + 1]))
    np.testing.assert_array_equal(shorter.length, [0, 2, SLOTS])
    assert shorter.keys is cache.keys
    assert shorter.values is cache.values


def test_empty_has_buffers_of_its_own() -> None:
    cache = caches.empty(3, (2, 1, SLOTS, 4), jnp.bfloat16)
    buffers = cache.keys + cache.values
    assert len({x.unsafe_buffer_pointer() for x in buffers}) == 6
    assert {(x.shape, x.dtype.name) for x in buffers} == {((2, 1, SLOTS, 4), "bfloat16")}
    np.testing.assert_array_equal(cache.length, [0, 0])


def test_tie_keeps_counts_unless_the_pass_failed() -> None:
    count = jnp.array([0, 3, 2])
    features = jnp.array([[[1.0, jnp.nan]], [[-jnp.inf, 2.0]], [[jnp.nan, 0.0]]])
    np.testing.assert_array_equal(caches.tie(count, features), [0, 3, 0])
