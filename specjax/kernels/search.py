"""Where strings occur among sorted suffixes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.kernels import native
from specjax.types import Array


def search(order: Array, tokens: Array, wanted: Array, sizes: np.ndarray) -> Array:
    """The range of suffixes that begin with a string and go on: its first place and the next after.

    On CPU one kernel does it: all strings advance together, so that their reads overlap, while XLA
    takes several operations for each of many turns and wakes threads for large tables.

    Args:
        order: [L] int32, the starts of the suffixes of `tokens`, sorted.
        tokens: [L] int32; -1 ends a suffix.
        wanted: [B, M, W] int32, the strings, of which the first sizes[m] tokens count.
        sizes: [M], 1 to W each.

    Returns:
        [B, M, 2] int32.
    """
    plain = functools.partial(_plain, sizes=sizes)
    if not native.available():
        return plain(order, tokens, wanted)
    kernel = functools.partial(_kernel, sizes=sizes)
    return lax.platform_dependent(order, tokens, wanted, cpu=kernel, default=plain)


def _kernel(order: Array, tokens: Array, wanted: Array, sizes: np.ndarray) -> Array:
    result = jax.ShapeDtypeStruct((*wanted.shape[:2], 2), jnp.int32)
    call = jax.ffi.ffi_call(native.SEARCH, result, vmap_method="sequential")
    return call(order, tokens, wanted, jnp.asarray(sizes, jnp.int32))


def _plain(order: Array, tokens: Array, wanted: Array, sizes: np.ndarray) -> Array:
    place = np.arange(wanted.shape[2] + 1, dtype=np.int32)
    size = np.asarray(sizes, np.int32)[:, None, None, None]  # [M, 1, 1, 1]
    # The range starts with the string and token 0, the least that may follow: ends come before. Its
    # end is the last place that the string starts.
    wanted = jnp.pad(wanted, ((0, 0), (0, 0), (0, 1)))[:, :, None, None]
    wanted = jnp.where(place < size, wanted, 0)  # [B, M, 1, 1, W + 1]
    is_end = np.array([False, True])[:, None]
    is_compared = place < size + ~is_end[..., None]  # [M, 2, 1, W + 1]
    equal = 2 * place.size
    # Four parts a turn: a turn costs more than the comparisons in it.
    turns = math.ceil(len(order).bit_length() / 2)
    probe = np.array([1, 2, 3], np.int32)

    def quarter(turn: Array, bound: Array) -> Array:
        """The bound is `bound` or up to 4^(turns - turn) - 1 places later."""
        part = jnp.int32(1) << 2 * (turns - 1 - turn)
        at = bound[..., None] + part * probe - 1
        start = order.at[at].get(mode="clip")
        seen = tokens.at[start[..., None] + place].get(mode="clip")  # [B, M, 2, 3, W + 1]
        # The first difference decides: its place and its sign in one number, and one reduction.
        differs = (seen != wanted) & is_compared
        first = jnp.where(differs, 2 * place + (seen > wanted), equal).min(-1)
        precedes = (first % 2 == 0) & ((first < equal) | is_end) & (at < len(order))
        return bound + part * precedes.sum(-1)

    low = jnp.zeros((wanted.shape[0], len(sizes), 2), jnp.int32)
    return lax.fori_loop(0, turns, quarter, low)
