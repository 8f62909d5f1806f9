"""The only writers of history: token buffers and key/value caches.

Every write happens in place inside a compiled loop. XLA on CPU can only do that where the write
depends on everything the same pass read from the cache; a verdict does, a prompt's known length
does not, hence `tie`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from specjax.types import Array, Block, Cache


def empty(
    num_layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype = jnp.float32
) -> Cache:
    """A cache without history; `shape` is (B, K, S, H) of each layer's keys and values."""

    def zeros() -> tuple[Array, ...]:  # separate buffers: donation refuses an array given twice
        return tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))

    return Cache(zeros(), zeros(), jnp.zeros(shape[0], jnp.int32))


def write(buffer: Array, values: Array, start: Array, count: Array) -> Array:
    """Writes each row's first `count` values at `start`; beyond the buffer nothing is written.

    Args:
        buffer: [B, S, ...].
        values: [B, P, ...].
        start: [B] int32, first slot.
        count: [B] int32, at most P.

    Returns:
        The buffer, [B, S, ...].
    """
    slots = _slots(start, count, values.shape[1], buffer.shape[1])
    return jax.vmap(lambda b, i, v: b.at[i].set(v, mode="drop", unique_indices=True))(
        buffer, slots, values.astype(buffer.dtype)
    )


def commit(cache: Cache, block: Block, path: Array, num_nodes: Array) -> Cache:
    """Makes the path's first `num_nodes` nodes history, at `cache.length`.

    Args:
        path: [B, P] int32, indices into the block's M tokens.
        num_nodes: [B] int32, at most P; 0 leaves the row as it is.
    """
    num_slots = cache.keys[0].shape[2]
    slots = _slots(cache.length, num_nodes, path.shape[1], num_slots)

    def row(buffer: Array, new: Array, nodes: Array, i: Array) -> Array:  # [K,S,H], [K,M,H]
        new = new.at[:, nodes].get(mode="promise_in_bounds").astype(buffer.dtype)
        return buffer.at[:, i].set(new, mode="drop", unique_indices=True)

    def put(buffers: tuple[Array, ...], news: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jax.vmap(row)(b, n, path, slots) for b, n in zip(buffers, news, strict=True))

    length = jnp.minimum(cache.length + num_nodes, num_slots)
    return Cache(put(cache.keys, block.keys), put(cache.values, block.values), length)


def truncate(cache: Cache, length: Array) -> Cache:
    """Forgets what lies at or beyond `length` [B]."""
    return dataclasses.replace(cache, length=jnp.minimum(cache.length, length))


def tie(count: Array, features: Array) -> Array:
    """Makes `count` [B] depend on a pass's features [B, N, F], final norm first, value unchanged.

    Without the dependence XLA on CPU may order a cache's write before its reads, and then copies
    the cache. (A pass that produced NaN commits nothing.)
    """
    return jnp.where(jnp.isnan(features[:, -1, 0]), 0, count)


def _slots(start: Array, count: Array, width: int, num_slots: int) -> Array:
    """[B, P] target slots; what must not be written gets distinct indices beyond the buffer."""
    offset = jnp.arange(width, dtype=jnp.int32)
    slots = jnp.where(offset < count[:, None], start[:, None] + offset, num_slots)
    return jnp.where(slots < num_slots, slots, num_slots + offset)
