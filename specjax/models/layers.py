"""The layers of a decoder; weights are [out, in] and named as Llama's are at Hugging Face."""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from specjax.kernels.attention import attend, capped, rotate
from specjax.kernels.linear import (
    ACTIVATIONS,
    Int8,
    LayerNorm,
    RMSNorm,
    Weights,
    gated,
    linear,
    linears,
)
from specjax.kernels.linear import Norm as AnyNorm
from specjax.types import Array


class RopeScaling(NamedTuple):
    """Llama 3.1's stretch of slow rotations to longer contexts (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class LinearRopeScaling(NamedTuple):
    """All rotations this much slower (arXiv 2306.15595; `rope_type` "linear")."""

    factor: float


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | LinearRopeScaling | None
) -> np.ndarray:
    """Angular frequency of each pair of channels, radians per position, [H / 2] float32."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearRopeScaling):
        frequency = frequency / scaling.factor
    elif scaling is not None:
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
    """The weights of a norm, which the products after it apply."""

    eps: float
    dtype: jnp.dtype
    offset: float = 0.0  # added to an RMSNorm's weights
    centred: bool = False  # a LayerNorm

    @nn.compact
    def __call__(self, width: int) -> AnyNorm:
        weight = self.param(
            "weight", nn.initializers.constant(1 - self.offset), (width,), self.dtype
        )
        if self.centred:
            bias = self.param("bias", nn.initializers.zeros, (width,), self.dtype)
            return LayerNorm(weight, bias, self.eps)
        if self.offset:
            weight = weight.astype(jnp.float32) + self.offset
        return RMSNorm(weight, self.eps)


def added(residual: Array, x: Array, w: Weights, post: AnyNorm | None = None) -> Array:
    """residual + post(x w^T)."""
    if post is None:
        return linear(x, w, residual=residual)
    return residual + post(linear(x, w))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) over a prefix and a block, added to a residual."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    out_std: float
    dtype: jnp.dtype
    biases: tuple[str, ...] = ()  # the projections that add one
    qk_norm: Callable[[str], Norm] | None = None  # of queries and keys, given its name
    scale: float | None = None  # of scores; H^-0.5 by default
    softcap: float | None = None  # of scores

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, N, in]
        norm: AnyNorm | None,  # of x, before the projections
        cos: Array,
        sin: Array,
        mask: Array,  # [B, N, M]
        prefix: tuple[Array, Array, Array],  # keys, values [B, K, S, H], length [B]
        block: tuple[Array, Array] | None,  # keys, values [B, K, M - N, H] of earlier nodes
        residual: Array | None = None,  # [B, N, E]; x itself by default
        post: AnyNorm | None = None,  # of what is added to it
        skip: Array | None = None,  # [B, N], see `attend`
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
        names = ("q_proj", "k_proj", "v_proj")
        products = zip(names, linears(x, projections, norm), strict=True)
        queries, keys, values = (self._biased(*y).reshape(b, n, -1, h) for y in products)
        if self.qk_norm is not None:
            queries, keys = self.qk_norm("q_norm")(h)(queries), self.qk_norm("k_norm")(h)(keys)
        if self.scale is not None:
            queries = queries * (self.scale * h**0.5)  # `attend` divides by the root of H
        self.sow("intermediates", "queries", queries)  # costs nothing unless asked for
        out, keys, values = attend(
            queries, keys, values, cos, sin, mask, prefix, block, skip, self.softcap
        )
        out = out.reshape(b, n, self.num_heads * h)
        o_proj = weight("o_proj", residual.shape[-1], self.num_heads * h, self.out_std)
        return self._biased("o_proj", added(residual, out, o_proj, post)), keys, values

    def _biased(self, name: str, y: Array) -> Array:
        if name not in self.biases:
            return y
        return y + self.param(f"{name}_bias", nn.initializers.zeros, y.shape[-1:], self.dtype)


def attention_weight(
    queries: Array,
    cos: Array,
    sin: Array,
    mask: Array,
    prefix: tuple[Array, Array],
    block: Array,
    softcap: float | None = None,
) -> Array:
    """How much of the attention of some tokens falls on each slot of the prefix.

    Args:
        queries: [B, N, Q, H], before rotation.
        cos, sin: [B, N, H / 2] float32.
        mask: [B, N, N] bool, which of the new tokens each one sees.
        prefix: keys [B, K, S, H] and the number of slots in use [B] int32.
        block: keys [B, K, N, H] of the new tokens.
        softcap: see `attend`.

    Returns:
        [B, K, S] float32, summed over the tokens and the queries that share a key; 0 beyond the
        prefix.
    """
    b, n, _, h = queries.shape
    keys, length = prefix
    q = rotate(queries.astype(jnp.float32), cos, sin) * h**-0.5
    q = q.reshape(b, n, block.shape[1], -1, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, N, H]

    def scores(keys: Array) -> Array:
        x = jnp.einsum("bkgnh,bksh->bkgns", q, keys.astype(jnp.float32))
        return capped(x, softcap)

    seen = jnp.arange(keys.shape[2], dtype=jnp.int32) < length[:, None]
    before = jnp.where(seen[:, None, None, None], scores(keys), -jnp.inf)
    among = jnp.where(mask[:, None, None], scores(block), -jnp.inf)
    peak = jnp.maximum(
        before.max(-1, keepdims=True, initial=-jnp.inf), among.max(-1, keepdims=True)
    )
    before, among = jnp.exp(before - peak), jnp.exp(among - peak)
    total = before.sum(-1, keepdims=True) + among.sum(-1, keepdims=True)
    return (before / total).sum((2, 3))


class MLP(nn.Module):
    """Feed-forward layer added to x: gated as in arXiv 2002.05202, or of one inner product."""

    intermediate_size: int
    out_std: float
    dtype: jnp.dtype
    activation: str = "silu"
    gated: bool = True
    biases: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: Array, norm: AnyNorm, post: AnyNorm | None = None) -> Array:
        width, inner = x.shape[-1], self.intermediate_size
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        names = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        ups = [self.param(name, normal(0.02), (inner, width), self.dtype) for name in names]
        down = self.param("down_proj", normal(self.out_std), (width, inner), self.dtype)
        if self.gated:
            y = gated(x, ups[0], ups[1], norm, self.activation)
        else:
            y = linear(x, ups[0], norm=norm)
            if "up_proj" in self.biases:
                y = y + self.param("up_proj_bias", zeros, (inner,), self.dtype)
            y = ACTIVATIONS[self.activation](y)
        y = added(x, y, down, post)
        if "down_proj" in self.biases:
            y = y + self.param("down_proj_bias", zeros, (width,), self.dtype)
        return y


class Experts(nn.Module):
    """Gated feed-forward layers of which each token takes the likeliest few (arXiv 2401.04088).

    Few tokens read the weights of the experts that they take, one after another; many are given to
    every expert, which multiplies those of others by 0.
    """

    num_experts: int
    num_taken: int  # per token
    renormalized: bool  # the taken ones' probabilities sum to 1
    intermediate_size: int
    out_std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, norm: AnyNorm, post: AnyNorm | None = None) -> Array:
        width, inner, count = x.shape[-1], self.intermediate_size, self.num_experts
        normal = nn.initializers.normal
        router = self.param("router", normal(0.02), (count, width), self.dtype)
        gate = self.param("gate_proj", normal(0.02), (count, inner, width), self.dtype)
        up = self.param("up_proj", normal(0.02), (count, inner, width), self.dtype)
        down = self.param("down_proj", normal(self.out_std), (count, width, inner), self.dtype)

        rows = norm(x).reshape(-1, width)  # [T, E]
        probs = jax.nn.softmax(linear(rows, router, jnp.float32), -1)
        taken, which = jax.lax.top_k(probs, self.num_taken)  # [T, number taken]
        if self.renormalized:
            taken = taken / taken.sum(-1, keepdims=True)

        def expert(rows: Array, gate: Array, up: Array, down: Array) -> Array:
            return linear(gated(rows, gate, up), down, jnp.float32)

        if which.size < count:

            def one(pair: tuple[Array, Array]) -> Array:
                row, i = pair
                return expert(rows[row][None], gate[i], up[i], down[i])[0]

            token = jnp.repeat(jnp.arange(len(rows)), self.num_taken)
            each = jax.lax.map(one, (token, which.reshape(-1)))
            y = (each.reshape(*which.shape, width) * taken[..., None]).sum(1)
        else:
            share = (jax.nn.one_hot(which, count) * taken[..., None]).sum(1)  # [T, experts]

            def add(y: Array, of_expert: tuple[Array, ...]) -> tuple[Array, None]:
                share, *matrices = of_expert
                return y + share[:, None] * expert(rows, *matrices), None

            nothing = jnp.zeros(rows.shape, jnp.float32)
            y, _ = jax.lax.scan(add, nothing, (share.T, gate, up, down))
        y = y.reshape(x.shape).astype(x.dtype)
        return x + (y if post is None else post(y))
