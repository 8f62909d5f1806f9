"""A few pieces of a large table."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import native
from specjax.types import Array


def gather(table: Array, start: Array, size: int) -> Array:
    """The entries of a table from each start on; places outside of it are the first and the last.

    XLA on CPU weighs a gather by its whole table: for a few bytes of a large one it wakes other
    threads, and waits for them longer than the bytes take. There, one thread copies them.

    Args:
        table: [R, ...].
        start: [...] int32.
        size: W, entries of a piece.

    Returns:
        [*start.shape, W, *table.shape[1:]].
    """
    if not native.available():
        return _plain(table, start, size)
    kernel, plain = functools.partial(_kernel, size=size), functools.partial(_plain, size=size)
    return lax.platform_dependent(table, start, cpu=kernel, default=plain)


def _kernel(table: Array, start: Array, size: int) -> Array:
    result = jax.ShapeDtypeStruct((*start.shape, size, *table.shape[1:]), table.dtype)
    return jax.ffi.ffi_call(native.GATHER, result, vmap_method="sequential")(table, start)


def _plain(table: Array, start: Array, size: int) -> Array:
    place = start[..., None] + jnp.arange(size, dtype=jnp.int32)
    return table[jnp.clip(place, 0, len(table) - 1)]
