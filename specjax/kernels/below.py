"""The weight that lies below each entry of a row, in the order of some keys."""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import native
from specjax.types import Array


def below(keys: Array, weights: Array) -> Array:
    """Sums the weights of the entries with lower keys, ties going by id, lowest first.

    XLA on CPU takes milliseconds to sort a vocabulary; there, float32 goes through a kernel.

    Args:
        keys: [..., V], at least 0.
        weights: [..., V], at least 0.

    Returns:
        [..., V].
    """
    rows = (keys.reshape(-1, keys.shape[-1]), weights.reshape(-1, keys.shape[-1]))
    if keys.dtype == weights.dtype == jnp.float32 and native.available():
        found = lax.platform_dependent(*rows, cpu=_kernel, default=_sorted)
    else:
        found = _sorted(*rows)
    return found.reshape(keys.shape)


def _kernel(keys: Array, weights: Array) -> Array:
    result = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    return jax.ffi.ffi_call(native.BELOW, result, vmap_method="sequential")(keys, weights)


def _sorted(keys: Array, weights: Array) -> Array:
    ids = lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    _, ids, sorted_weights = lax.sort((keys, ids, weights), num_keys=1)
    sums = jnp.pad(jnp.cumsum(sorted_weights, 1)[:, :-1], ((0, 0), (1, 0)))
    return lax.sort((ids, sums), num_keys=1)[1]
