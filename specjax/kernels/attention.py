"""Attention of a few new tokens over [committed prefix | block], under any tree mask."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning

from specjax.kernels import native
from specjax.types import Array


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary embedding (arXiv 2104.09864), halves rotated against each other.

    Args:
        x: [B, N, heads, H].
        cos, sin: [B, N, H / 2] float32.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def capped(x: Array, cap: float | None) -> Array:
    """c tanh(x / c), or x itself without a cap (arXiv 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    queries: Array,
    keys: Array,
    values: Array,
    cos: Array,
    sin: Array,
    mask: Array,
    prefix: tuple[Array, Array, Array],
    block: tuple[Array, Array] | None = None,
    skip: Array | None = None,
    softcap: float | None = None,
) -> tuple[Array, Array, Array]:
    """Rotary softmax attention over the prefix's history and the block, the new tokens last in it.

    On CPU up to `native.FEW_TOKENS` float32 tokens go through a kernel that reads only the slots in
    use. Each row sums over the keys it sees in order of their positions, so a token's result does
    not depend on how much of its history is in the prefix already. Keys and values of the block
    have the prefix's type, all sums are float32.

    Args:
        queries: [B, N, Q, H], before rotation; Q is a multiple of K, consecutive ones share a key.
        keys, values: [B, N, K, H], before rotation.
        cos, sin: [B, N, H / 2] float32.
        mask: [B, N, M] bool, which block slots each query sees.
        prefix: keys and values [B, K, S, H], float32 or bfloat16, S may be 0, and the number of
            slots in use [B] int32.
        block: keys and values [B, K, M - N, H] of earlier nodes, of the prefix's type.
        skip: [B, N] int32, how many of the keys that a token sees, the prefix's and then those of
            the block that its mask shows, it does not see after all, from the first; fewer than it
            sees. By default 0.
        softcap: of scores, see `capped`.

    Returns:
        The mixed values [B, N, Q, H] and the block's keys and values [B, K, M, H].
    """
    b, n, k, h = keys.shape
    kind = prefix[0].dtype
    if block is None:
        block = (jnp.zeros((b, k, 0, h), kind), jnp.zeros((b, k, 0, h), kind))
    arrays = (queries, keys, values, cos, sin, mask, skip, *prefix, *block)
    stored = {x.dtype for x in (*prefix[:2], *block)}
    served = stored in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)})
    served &= queries.dtype == jnp.float32  # others would be rounded otherwise than in training
    if n > native.FEW_TOKENS or not prefix[0].shape[2] or not served or not native.available():
        return _two_products(softcap, *arrays)
    few, default = partial(_few_rows, softcap), partial(_two_products, softcap)
    return lax.platform_dependent(*arrays, cpu=few, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _few_rows(softcap: float | None, *arrays: Array) -> tuple[Array, Array, Array]:
    """The kernel, whose batch takes in what `vmap` adds."""
    if arrays[6] is None:
        nothing = jnp.zeros(arrays[0].shape[:2], jnp.int32)
        arrays = (*arrays[:6], nothing, *arrays[7:])
    kernel = custom_vmap(partial(_sharded, softcap))

    @kernel.def_vmap
    def rule(size: int, batched: list[bool], *arrays: Array) -> tuple[Any, tuple[bool, ...]]:
        def merged(x: Array, is_batched: bool) -> Array:
            x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = kernel(*map(merged, arrays, batched))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * 3

    mixed, block_keys, block_values = kernel(*arrays)
    return mixed, block_keys, block_values


def _forward(
    softcap: float | None, *arrays: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    return _few_rows(softcap, *arrays), arrays


def _backward(
    softcap: float | None, arrays: tuple[Array, ...], d_results: tuple[Array, ...]
) -> tuple[Array, ...]:
    return jax.vjp(partial(_two_products, softcap), *arrays)[1](d_results)


_few_rows.defvjp(_forward, _backward)


# One word for each axis of the kernel's operands and results; devices may share b and heads.
_OPERANDS = (
    *("b n heads g h", "b n heads h", "b n heads h", "b n half", "b n half", "b n m", "b n"),
    *("b heads s h", "b heads s h", "b", "b heads earlier h", "b heads earlier h"),
)
_RESULTS = ("b n heads g h", "b heads m h", "b heads m h")
_WHOLE = "n g h half m s earlier"


def _sharded(softcap: float | None, *arrays: Array) -> tuple[Array, Array, Array]:
    def part(*arrays: Array) -> tuple[Array, Array, Array]:
        return _kernel(softcap, *arrays)

    kernel = custom_partitioning(part)
    kernel.def_partition(
        partition=partial(native.partition, part, _OPERANDS, _RESULTS, _WHOLE),
        sharding_rule=f"{', '.join(_OPERANDS)} -> {', '.join(_RESULTS)}",
        need_replication_factors=tuple(_WHOLE.split()),
    )
    b, n, k, h = arrays[1].shape
    mixed, block_keys, block_values = kernel(arrays[0].reshape(b, n, k, -1, h), *arrays[1:])
    return mixed.reshape(b, n, -1, h), block_keys, block_values


def _kernel(softcap: float | None, *arrays: Array) -> tuple[Array, Array, Array]:
    """Queries and mixed values are [B, N, K, Q / K, H] here."""
    queries, keys, mask = arrays[0], arrays[1], arrays[5]
    b, _, k, h = keys.shape
    block = jax.ShapeDtypeStruct((b, k, mask.shape[2], h), arrays[7].dtype)
    results = (jax.ShapeDtypeStruct(queries.shape, jnp.float32), block, block)
    call = jax.ffi.ffi_call(native.ATTENTION, results)
    mixed, block_keys, block_values = call(*arrays, softcap=np.float32(softcap or 0))
    return mixed, block_keys, block_values


def _two_products(
    softcap: float | None,
    queries: Array,
    keys: Array,
    values: Array,
    cos: Array,
    sin: Array,
    mask: Array,
    skip: Array | None,
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
    stored = prefix_keys.dtype  # both kinds of keys: where a token lies must not matter
    kind = jnp.promote_types(queries.dtype, stored)
    keys = rotate(keys, cos, sin).swapaxes(1, 2).astype(stored)
    keys = jnp.concatenate([block_keys, keys], 2)
    values = jnp.concatenate([block_values, values.swapaxes(1, 2).astype(stored)], 2)
    q = (rotate(queries, cos, sin) * h**-0.5).reshape(b, n, k, g, h)
    q = q.transpose(0, 2, 3, 1, 4).reshape(b, k, g * n, h)

    def scores(keys: Array) -> Array:
        keys = keys.astype(kind)
        x = jnp.einsum("bkqh,bksh->bkqs", q.astype(kind), keys, preferred_element_type=jnp.float32)
        return capped(x, softcap).reshape(b, k, g, n, -1)

    slot, length = jnp.arange(s, dtype=jnp.int32), prefix_length[:, None, None]
    seen = slot < length  # [B, 1 or N, S]
    if skip is not None:
        seen &= slot >= skip[..., None]
        mask &= length + jnp.cumsum(mask, -1, dtype=jnp.int32) > skip[..., None]
    prefix = jnp.where(seen[:, None, None], scores(prefix_keys), -jnp.inf)
    block = jnp.where(mask[:, None, None], scores(keys), -jnp.inf)
    peak = jnp.maximum(
        prefix.max(-1, keepdims=True, initial=-jnp.inf), block.max(-1, keepdims=True)
    )
    prefix, block = jnp.exp(prefix - peak), jnp.exp(block - peak)
    total = prefix.sum(-1, keepdims=True) + block.sum(-1, keepdims=True)

    def mix(weights: Array, values: Array) -> Array:
        weights = weights.reshape(b, k, g * n, -1).astype(kind)
        values = values.astype(kind)
        return jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=jnp.float32)

    out = mix(prefix, prefix_values) + mix(block, values)
    out = out.reshape(b, k, g, n, h) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(queries.dtype), keys, values
