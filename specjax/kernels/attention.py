"""Attention of a few new tokens over [committed prefix | block], under any tree mask."""

import jax
import jax.numpy as jnp
from jax import lax

from specjax.kernels import native
from specjax.types import Array

FEW_ROWS = 32  # the kernel's; more are a prompt's or training's, which XLA's products serve well


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding (arXiv 2104.09864), halves rotated against each other.

    Args:
        x: [B, N, heads, H].
        cos, sin: [B, N, H / 2] float32.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    cos: Array,
    sin: Array,
    mask: Array,
    prefix: tuple[Array, Array, Array],
    block: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Rotary softmax attention over the prefix's history and the block, the new tokens last in it.

    On CPU, up to `FEW_ROWS` float32 tokens go through a kernel that reads only the slots in use.

    Args:
        queries: [B, N, Q, H], before rotation; Q is a multiple of K, consecutive ones share a key.
        keys, values: [B, N, K, H], before rotation.
        cos, sin: [B, N, H / 2] float32.
        mask: [B, N, M] bool, which block slots each query sees.
        prefix: keys and values [B, K, S, H], S may be 0, and the number of slots in use [B] int32.
        block: keys and values [B, K, M - N, H] of earlier nodes.

    Returns:
        The mixed values [B, N, Q, H] and the block's keys and values [B, K, M, H].
    """
    b, n, k, h = keys.shape
    if block is None:
        block = (jnp.zeros((b, k, 0, h), keys.dtype), jnp.zeros((b, k, 0, h), values.dtype))
    arrays = (queries, keys, values, cos, sin, mask, *prefix, *block)
    float32 = all(x.dtype == jnp.float32 for x in (queries, prefix[0], block[0]))
    if n <= FEW_ROWS and prefix[0].shape[2] > 0 and float32 and native.available():
        return lax.platform_dependent(*arrays, cpu=_few_rows, default=_two_products)
    return _two_products(*arrays)


@jax.custom_vjp
def _few_rows(*arrays: Array) -> tuple[Array, Array, Array]:
    queries, keys, mask = arrays[0], arrays[1], arrays[5]
    b, _, k, h = keys.shape
    block = jax.ShapeDtypeStruct((b, k, mask.shape[2], h), jnp.float32)
    results = (jax.ShapeDtypeStruct(queries.shape, jnp.float32), block, block)
    call = jax.ffi.ffi_call(native.ATTENTION, results, vmap_method="sequential")
    mixed, block_keys, block_values = call(*arrays)
    return mixed, block_keys, block_values


def _forward(*arrays: Array) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    return _few_rows(*arrays), arrays


def _backward(arrays: tuple[Array, ...], d_results: tuple[Array, ...]) -> tuple[Array, ...]:
    return jax.vjp(_two_products, *arrays)[1](d_results)


_few_rows.defvjp(_forward, _backward)


def _two_products(
    queries: Array,
    keys: Array,
    values: Array,
    cos: Array,
    sin: Array,
    mask: Array,
    prefix_keys: Array,
    prefix_values: Array,
    prefix_length: Array,
    block_keys: Array,
    block_values: Array,
) -> tuple[Array, Array, Array]:
    """The same in plain operations, never concatenating a cache.

    Queries are folded to [B, K, G * N, H] so that neither product transposes or copies the cache.
    """
    b, n, k, h = keys.shape
    g, s = queries.shape[2] // k, prefix_keys.shape[2]
    keys = rotate(keys, cos, sin).swapaxes(1, 2)
    keys = jnp.concatenate([block_keys, keys], 2)
    values = jnp.concatenate([block_values, values.swapaxes(1, 2)], 2)
    q = (rotate(queries, cos, sin) * h**-0.5).reshape(b, n, k, g, h)
    q = q.transpose(0, 2, 3, 1, 4).reshape(b, k, g * n, h)

    def scores(keys: Array) -> Array:
        x = jnp.einsum(
            "bkqh,bksh->bkqs", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32
        )
        return x.reshape(b, k, g, n, -1)

    seen = jnp.arange(s, dtype=jnp.int32) < prefix_length[:, None]  # [B, S]
    prefix = jnp.where(seen[:, None, None, None, :], scores(prefix_keys), -jnp.inf)
    block = jnp.where(mask[:, None, None], scores(keys), -jnp.inf)
    peak = jnp.maximum(
        prefix.max(-1, keepdims=True, initial=-jnp.inf), block.max(-1, keepdims=True)
    )
    prefix, block = jnp.exp(prefix - peak), jnp.exp(block - peak)
    total = prefix.sum(-1, keepdims=True) + block.sum(-1, keepdims=True)

    def mix(weights: Array, values: Array) -> Array:
        weights = weights.reshape(b, k, g * n, -1).astype(values.dtype)
        return jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=jnp.float32)

    out = mix(prefix, prefix_values) + mix(block, values)
    out = out.reshape(b, k, g, n, h) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(queries.dtype), keys, values
