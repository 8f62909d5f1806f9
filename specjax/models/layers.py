"""The layers of a Llama-like transformer; weights are [out, in] and have Hugging Face's names."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from specjax.kernels.attention import attend, rotate
from specjax.kernels.linear import Int8, RMSNorm, Weights, gated, linear, linears
from specjax.types import Array


class RopeScaling(NamedTuple):
    """Llama 3.1's stretch of slow rotations to longer contexts (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each pair of channels, radians per position, [H / 2] float32."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        wavelength = 2 * math.pi / frequency
        original = scaling.original_max_position_embeddings
        # 0 where a wave is longer than original / low, 1 where shorter than original / high.
        keep = (original / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        keep = np.clip(keep, 0.0, 1.0)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    return frequency.astype(np.float32)


def rotation(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Cosines and sines [B, N, H / 2] float32 for positions [B, N]."""
    angle = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angle), jnp.sin(angle)


FEW_TOKENS = 16


def embed(table: Weights, tokens: Array) -> Array:
    """Rows of a table [V, E] for tokens [B, N], [B, N, E]."""
    if isinstance(table, Int8):
        scales = embed(table.scales[:, None], tokens)
        return embed(table.values, tokens).astype(scales.dtype) * scales
    if tokens.size > FEW_TOKENS:
        return table[tokens]
    # XLA on CPU weighs a gather by its whole table and wakes threads for it; slices it just copies.
    rows = [jax.lax.dynamic_index_in_dim(table, token, 0) for token in tokens.reshape(-1)]
    return jnp.concatenate(rows).reshape(*tokens.shape, table.shape[1])


class Norm(nn.Module):
    """The weights of an RMSNorm, which the products after it apply."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, width: int) -> RMSNorm:
        return RMSNorm(self.param("weight", nn.initializers.ones, (width,), self.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) over a prefix and a block, added to a residual."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, N, in]
        norm: RMSNorm | None,  # of x, before the projections
        cos: Array,
        sin: Array,
        mask: Array,  # [B, N, M]
        prefix: tuple[Array, Array, Array],  # keys, values [B, K, S, H], length [B]
        block: tuple[Array, Array] | None,  # keys, values [B, K, M - N, H] of earlier nodes
        residual: Array | None = None,  # [B, N, E]; x itself by default
    ) -> tuple[Array, Array, Array]:
        """Returns the sum [B, N, E] and the longer block's keys and values [B, K, M, H]."""
        residual = x if residual is None else residual
        b, n, width = x.shape
        k, h = self.num_kv_heads, self.head_dim

        def weight(name: str, rows: int, columns: int, std: float = 0.02) -> Array:
            init = nn.initializers.normal(std)
            return self.param(name, init, (rows, columns), self.dtype)

        projections = tuple(
            weight(name, number * h, width)
            for name, number in (("q_proj", self.num_heads), ("k_proj", k), ("v_proj", k))
        )
        queries, keys, values = (y.reshape(b, n, -1, h) for y in linears(x, projections, norm))
        self.sow("intermediates", "queries", queries)  # costs nothing unless asked for
        out, keys, values = attend(queries, keys, values, cos, sin, mask, prefix, block)
        out = out.reshape(b, n, self.num_heads * h)
        o_proj = weight("o_proj", residual.shape[-1], self.num_heads * h, self.out_std)
        return linear(out, o_proj, residual=residual), keys, values


def attention_weight(
    queries: Array, cos: Array, sin: Array, mask: Array, prefix: tuple[Array, Array], block: Array
) -> Array:
    """How much of the attention of some tokens falls on each slot of the prefix.

    Args:
        queries: [B, N, Q, H], before rotation.
        cos, sin: [B, N, H / 2] float32.
        mask: [B, N, N] bool, which of the new tokens each one sees.
        prefix: keys [B, K, S, H] and the number of slots in use [B] int32.
        block: keys [B, K, N, H] of the new tokens.

    Returns:
        [B, K, S] float32, summed over the tokens and the queries that share a key; 0 beyond the
        prefix.
    """
    b, n, _, h = queries.shape
    keys, length = prefix
    q = rotate(queries.astype(jnp.float32), cos, sin) * h**-0.5
    q = q.reshape(b, n, block.shape[1], -1, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, N, H]

    def scores(keys: Array) -> Array:
        return jnp.einsum("bkgnh,bksh->bkgns", q, keys.astype(jnp.float32))

    seen = jnp.arange(keys.shape[2], dtype=jnp.int32) < length[:, None]
    before = jnp.where(seen[:, None, None, None], scores(keys), -jnp.inf)
    among = jnp.where(mask[:, None, None], scores(block), -jnp.inf)
    peak = jnp.maximum(
        before.max(-1, keepdims=True, initial=-jnp.inf), among.max(-1, keepdims=True)
    )
    before, among = jnp.exp(before - peak), jnp.exp(among - peak)
    total = before.sum(-1, keepdims=True) + among.sum(-1, keepdims=True)
    return (before / total).sum((2, 3))


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward layer (arXiv 2002.05202), added to x."""

    intermediate_size: int
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, norm: RMSNorm) -> Array:
        width, inner = x.shape[-1], self.intermediate_size
        normal = nn.initializers.normal
        gate = self.param("gate_proj", normal(0.02), (inner, width), self.dtype)
        up = self.param("up_proj", normal(0.02), (inner, width), self.dtype)
        down = self.param("down_proj", normal(self.out_std), (width, inner), self.dtype)
        return linear(gated(x, gate, up, norm), down, residual=x)
