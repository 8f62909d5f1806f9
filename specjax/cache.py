"""The only writers of history: token buffers and key/value caches.

Every write happens in place inside a compiled loop. XLA on CPU can only do that where the write
depends on everything the same pass read from the cache; a verdict does, a prompt's known length
does not, hence `tie`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from specjax.kernels import commit as kernel
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
    slots = kernel.slots(start, count, values.shape[1], buffer.shape[1])
    return jax.vmap(lambda b, i, v: b.at[i].set(v, mode="drop", unique_indices=True))(
        buffer, slots, values.astype(buffer.dtype)
    )


def commit(cache: Cache, block: Block, path: Array, num_nodes: Array) -> Cache:
    """Makes the path's first `num_nodes` nodes history, at `cache.length`.

    Args:
        path: [B, P] int32, indices into the block's M tokens.
        num_nodes: [B] int32, at most P; 0 leaves the row as it is.
    """
    news = tuple(
        new.astype(old.dtype)
        for old, new in zip(cache.keys + cache.values, block.keys + block.values, strict=True)
    )
    written = kernel.commit(cache.keys + cache.values, news, path, cache.length, num_nodes)
    length = jnp.minimum(cache.length + num_nodes, cache.keys[0].shape[2])
    return Cache(written[: len(cache.keys)], written[len(cache.keys) :], length)


def truncate(cache: Cache, length: Array) -> Cache:
    """Forgets what lies at or beyond `length` [B]."""
    return dataclasses.replace(cache, length=jnp.minimum(cache.length, length))


def tie(count: Array, features: Array) -> Array:
    """Makes `count` [B] depend on a pass's features [B, N, F], final norm first, value unchanged.

    Without the dependence XLA on CPU may order a cache's write before its reads, and then copies
    the cache. (A pass that produced NaN commits nothing.)
    """
    return jnp.where(jnp.isnan(features[:, -1, 0]), 0, count)
