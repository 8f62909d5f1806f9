"""Attention of a few new tokens over [committed prefix | block], under any tree mask."""

import jax.numpy as jnp

from specjax.types import Array


def attend(
    queries: Array,
    prefix_keys: Array,
    prefix_values: Array,
    prefix_length: Array,
    block_keys: Array,
    block_values: Array,
    mask: Array,
    scale: float,
) -> Array:
    """Softmax attention in two products, never concatenating a cache.

    Queries are folded to [B, K, G*N, H] so that neither product transposes or copies the cache.

    Args:
        queries: [B, N, K, G, H].
        prefix_keys, prefix_values: [B, K, S, H]; S may be 0.
        prefix_length: [B] int32, slots of the prefix that are history.
        block_keys, block_values: [B, K, M, H].
        mask: [B, N, M] bool, which block slots each query sees.
        scale: multiplies the scores.

    Returns:
        [B, N, K, G, H], in the queries' dtype.
    """
    b, n, k, g, h = queries.shape
    s = prefix_keys.shape[2]
    q = (queries * scale).transpose(0, 2, 3, 1, 4).reshape(b, k, g * n, h)

    def scores(keys: Array) -> Array:
        x = jnp.einsum(
            "bkqh,bksh->bkqs", q.astype(keys.dtype), keys, preferred_element_type=jnp.float32
        )
        return x.reshape(b, k, g, n, -1)

    seen = jnp.arange(s, dtype=jnp.int32) < prefix_length[:, None]  # [B, S]
    prefix = jnp.where(seen[:, None, None, None, :], scores(prefix_keys), -jnp.inf)
    block = jnp.where(mask[:, None, None], scores(block_keys), -jnp.inf)
    peak = jnp.maximum(
        prefix.max(-1, keepdims=True, initial=-jnp.inf), block.max(-1, keepdims=True)
    )
    prefix, block = jnp.exp(prefix - peak), jnp.exp(block - peak)
    total = prefix.sum(-1, keepdims=True) + block.sum(-1, keepdims=True)

    def mix(weights: Array, values: Array) -> Array:
        weights = weights.reshape(b, k, g * n, -1).astype(values.dtype)
        return jnp.einsum("bkqs,bksh->bkqh", weights, values, preferred_element_type=jnp.float32)

    out = mix(prefix, prefix_values) + mix(block, block_values)
    out = out.reshape(b, k, g, n, h) / total
    return out.transpose(0, 3, 1, 2, 4).astype(queries.dtype)
