"""Writing a path's keys and values into caches, in place."""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import native
from specjax.types import Array


def commit(
    buffers: tuple[Array, ...], news: tuple[Array, ...], path: Array, start: Array, count: Array
) -> tuple[Array, ...]:
    """Writes the path's first `count` nodes at `start`; beyond the buffer nothing is written.

    On CPU one kernel writes all buffers: XLA would give them to another thread, and wait for it to
    wake far longer than they take.

    Args:
        buffers: [B, K, S, H] each.
        news: [B, K, M, H] each, in the order of `buffers` and of their types.
        path: [B, P] int32, indices into the M nodes.
        start: [B] int32, first slot.
        count: [B] int32, at most P.
    """
    if not native.available():
        return _scatter(buffers, news, path, start, count)
    return lax.platform_dependent(buffers, news, path, start, count, cpu=_kernel, default=_scatter)


def slots(start: Array, count: Array, width: int, num_slots: int) -> Array:
    """[B, P] target slots; what must not be written gets distinct indices beyond the buffer."""
    offset = jnp.arange(width, dtype=jnp.int32)
    found = jnp.where(offset < count[:, None], start[:, None] + offset, num_slots)
    return jnp.where(found < num_slots, found, num_slots + offset)


def _kernel(
    buffers: tuple[Array, ...], news: tuple[Array, ...], path: Array, start: Array, count: Array
) -> tuple[Array, ...]:
    results = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in buffers)
    in_place = {3 + i: i for i in range(len(buffers))}
    call = jax.ffi.ffi_call(native.COMMIT, results, input_output_aliases=in_place)
    return tuple(call(path, start, count, *buffers, *news))


def _scatter(
    buffers: tuple[Array, ...], news: tuple[Array, ...], path: Array, start: Array, count: Array
) -> tuple[Array, ...]:
    where = slots(start, count, path.shape[1], buffers[0].shape[2])

    def row(buffer: Array, new: Array, nodes: Array, i: Array) -> Array:  # [K,S,H], [K,M,H]
        new = new.at[:, nodes].get(mode="promise_in_bounds")
        return buffer.at[:, i].set(new, mode="drop", unique_indices=True)

    return tuple(jax.vmap(row)(b, n, path, where) for b, n in zip(buffers, news, strict=True))
