"""How far a text agrees with its own end, place by place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.kernels import native
from specjax.types import Array


def agreement(tokens: Array, length: Array, ngram: int) -> Array:
    """How many of each row's newest tokens stand just before each slot, too.

    On CPU a kernel stops at the first difference; XLA compares all, and wakes threads for it.

    Args:
        tokens: [B, S] int32 history.
        length: [B] int32.
        ngram: how many of the newest tokens are compared at most.

    Returns:
        [B, S] int32; 0 outside of slots 1 to length - 1.
    """
    plain = functools.partial(_plain, ngram=ngram)
    if not native.available():
        return plain(tokens, length)
    kernel = functools.partial(_kernel, ngram=ngram)
    return lax.platform_dependent(tokens, length, cpu=kernel, default=plain)


def _kernel(tokens: Array, length: Array, ngram: int) -> Array:
    result = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
    call = jax.ffi.ffi_call(native.AGREEMENT, result, vmap_method="sequential")
    return call(tokens, length, ngram=np.int32(ngram))


def _plain(tokens: Array, length: Array, ngram: int) -> Array:
    slot = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    agree = jnp.zeros(tokens.shape, jnp.int32)
    unbroken = (slot < length[:, None]) & (slot > 0)
    for back in range(1, ngram + 1):
        newest = jnp.take_along_axis(tokens, jnp.maximum(length - back, 0)[:, None], 1)
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        unbroken &= (earlier == newest) & (slot >= back) & (length[:, None] >= back)
        agree += unbroken
    return agree
