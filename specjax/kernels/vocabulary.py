"""Reductions of rows over a vocabulary.

XLA on CPU takes several operations for each and wakes threads for long rows; there, float32 goes
through a kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import native
from specjax.types import Array

_HALVINGS = 5


def argmax(x: Array, noise: Array | None = None) -> Array:
    """The lowest id of the largest entry of x, or of x + noise, [..., V] -> [...] int32."""
    if not _served(x) or (noise is not None and not _served(noise)):
        return _argmax(x, noise)
    if noise is not None:
        x, noise = jnp.broadcast_arrays(x, noise)
    return lax.platform_dependent(x, noise, cpu=_argmax_kernel, default=_argmax)


def largest(x: Array, k: int) -> Array:
    """The ids of the k largest entries, [..., V] -> [..., k] int32, the largest first.

    Of equals the lowest id comes first. In a row with NaN they are any k ids.

    Raises:
        ValueError: k exceeds V.
    """
    if k > x.shape[-1]:
        raise ValueError(f"The {k} largest of {x.shape[-1]} entries were asked for; ask for fewer.")
    if not _served(x):
        return _largest(x, k)
    kernel = functools.partial(_largest_kernel, k=k)
    return lax.platform_dependent(x, cpu=kernel, default=functools.partial(_largest, k=k))


def softmax(log_weights: Array) -> Array:
    """The law of log-weights [..., V] that are not all -inf."""
    if not _served(log_weights):
        return _softmax(log_weights)
    return lax.platform_dependent(log_weights, cpu=_softmax_kernel, default=_softmax)


def peak(x: Array) -> Array:
    """The largest entry, [..., V] -> [..., 1]."""
    return lax.platform_dependent(x, cpu=_peak_by_halves, default=_peak)


def _peak(x: Array) -> Array:
    return x.max(-1, keepdims=True)


def _peak_by_halves(x: Array) -> Array:
    """Compares halves with each other first, a simple loop: so no thread is woken."""
    for _ in range(_HALVINGS):
        if x.shape[-1] % 2:
            break
        x = jnp.maximum(*jnp.split(x, 2, -1))
    return _peak(x)


def _served(x: Array) -> bool:
    return x.dtype == jnp.float32 and native.available()


def _argmax(x: Array, noise: Array | None) -> Array:
    """Two plain reductions, which XLA on CPU vectorises; its own argmax it does not."""
    x = x if noise is None else x + noise
    ids = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == peak(x), ids, x.shape[-1]).min(-1)


def _argmax_kernel(x: Array, noise: Array | None) -> Array:
    ids = jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32)
    call = jax.ffi.ffi_call(native.ARGMAX, ids, vmap_method="broadcast_all")
    return call(x, jnp.zeros((*x.shape[:-1], 0)) if noise is None else noise)


def _largest(x: Array, k: int) -> Array:
    return lax.top_k(x, k)[1]


def _largest_kernel(x: Array, k: int) -> Array:
    ids = jax.ShapeDtypeStruct((*x.shape[:-1], k), jnp.int32)
    return jax.ffi.ffi_call(native.TOP_K, ids, vmap_method="broadcast_all")(x)


def _softmax(log_weights: Array) -> Array:
    mass = jnp.exp(log_weights - peak(log_weights))
    return mass / mass.sum(-1, keepdims=True)


@jax.custom_jvp
def _softmax_kernel(x: Array) -> Array:
    law = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call(native.SOFTMAX, law, vmap_method="broadcast_all")(x)


@_softmax_kernel.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    law = _softmax_kernel(*primals)
    return law, law * (tangents[0] - (law * tangents[0]).sum(-1, keepdims=True))
