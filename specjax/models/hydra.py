"""Hydra's heads: Medusa's, each of which also reads the tokens drafted before its own.

Ankner et al., arXiv 2402.05109. Head k predicts token t + 2 + k from the concatenation of the
feature at position t with the embeddings of tokens t + 1 to t + 1 + k. Hydra++ (section 4) lets one
decoder layer of its own look over the features of all of the text before the heads read its output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from specjax import cache as caches
from specjax.kernels.linear import linear, linears
from specjax.models import layers
from specjax.models.medusa import activated, check_sizes
from specjax.models.transformer import DecoderLayer, TransformerConfig, sight
from specjax.types import Array, Block, Cache, Model, PyTree


class HydraHeads(NamedTuple):
    """Pure functions of K heads and of the layer before them, if there is one."""

    init: Callable  # (rng_key) -> params; every head passes the feature on, embeddings ignored
    init_cache: Callable  # (batch_size, max_length) -> Cache of the prefix layer
    look_back: Callable  # (params, features [B,N,E], positions [B,N], mask [B,N,M], cache,
    #                      block=None) -> (states [B,N,E], Block): the prefix layer, and its norm;
    #                      mask and block as for a Model
    hidden: Callable  # (params, k, inputs [..., (k+2)E]) -> [..., E]; inputs: the feature or the
    #                   prefix layer's state, then the path's embeddings, the root's first
    unembed: Callable  # (params, k, target, target_params, hidden [..., E]) -> [..., V] float32
    hidden_size: int  # the target's
    num_heads: int
    num_layers: int  # residual blocks of each head; those after the first share weights
    prefix: TransformerConfig | None  # of the prefix layer
    own_unembedding: bool  # each head has a matrix and a bias of its own
    vocab_size: int  # of those matrices; 0 without


class _PrefixLayer(nn.Module):
    """A decoder layer that reads features in place of embeddings, and a norm."""

    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Cache, block: Block | None
    ) -> tuple[Array, Block]:
        c = self.config
        at = positions if block is None else jnp.concatenate([block.positions, positions], 1)
        x, keys, values = DecoderLayer(c, self.dtype, name="layers_0")(
            x,
            sight(c, 0, positions, mask, cache.length, at),
            (cache.keys[0], cache.values[0], cache.length),
            None if block is None else (block.keys[0], block.values[0]),
        )
        norm = layers.Norm(c.norm_eps, self.dtype, name="norm")(c.hidden_size)
        return norm(x), Block((keys,), (values,), at)


def hydra_heads(
    hidden_size: int,
    num_heads: int = 4,
    num_layers: int = 1,
    prefix: TransformerConfig | None = None,
    own_unembedding: bool = False,
    vocab_size: int = 0,
    dtype: Any = jnp.float32,
) -> HydraHeads:
    """Builds the heads' pure functions.

    Args:
        hidden_size: the target's.
        num_heads: how many tokens below the root are predicted.
        num_layers: residual blocks of each head.
        prefix: the shape of a decoder layer before the heads, as in Hydra++; None for none.
        own_unembedding: gives each head a matrix and a bias of its own.
        vocab_size: its rows; needed there only.
        dtype: of activations and the cache; parameters are float32, logits anyway.

    Raises:
        ValueError: no head or no layer, an unembedding without rows, a prefix of several layers or
            another width.
    """
    check_sizes("Hydra", num_heads, num_layers, own_unembedding, vocab_size)
    vocab_size = vocab_size if own_unembedding else 0
    if prefix is not None and (prefix.num_layers, prefix.hidden_size) != (1, hidden_size):
        raise ValueError(
            f"The Hydra prefix has {prefix.num_layers} layers of hidden size {prefix.hidden_size}; "
            f"it must have 1 of the target's {hidden_size}."
        )
    layer = None if prefix is None else _PrefixLayer(prefix, dtype)

    def init(rng_key: Array) -> PyTree:
        def head(k: int, rng_key: Array) -> PyTree:
            def affine(weight: Array) -> dict[str, Array]:
                return {"weight": weight, "bias": jnp.zeros(weight.shape[0])}

            wide = jnp.zeros((hidden_size, (k + 2) * hidden_size))
            params = {
                "blocks_0": affine(wide),
                "res_connection": affine(wide.at[:, :hidden_size].set(jnp.eye(hidden_size))),
            }
            if num_layers > 1:
                params["blocks_1"] = affine(jnp.zeros((hidden_size, hidden_size)))
            if own_unembedding:
                shape = (vocab_size, hidden_size)
                params["lm_head"] = affine(0.02 * jax.random.normal(rng_key, shape))
            return params

        *keys, last = jax.random.split(rng_key, num_heads + 1)
        params = {f"heads_{k}": head(k, key) for k, key in enumerate(keys)}
        if layer is not None:
            one, seen = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
            nothing = jnp.zeros((1, 1, hidden_size), dtype)
            found = layer.init(last, nothing, one, seen, init_cache(1, 0), None)["params"]
            params["prefix"] = jax.tree.map(lambda x: x.astype(jnp.float32), found)
        return params

    def init_cache(batch_size: int, max_length: int) -> Cache:
        shape = (batch_size, prefix.num_kv_heads, max_length, prefix.head_dim)  # type: ignore[union-attr]
        return caches.empty(1, shape, dtype)

    def look_back(
        params: PyTree,
        features: Array,
        positions: Array,
        mask: Array,
        cache: Cache,
        block: Block | None = None,
    ) -> tuple[Array, Block]:
        found: Any = layer.apply(  # type: ignore[union-attr]
            {"params": params["prefix"]}, features.astype(dtype), positions, mask, cache, block
        )
        return found

    def hidden(params: PyTree, k: int, inputs: Array) -> Array:
        head = params[f"heads_{k}"]
        first, around = head["blocks_0"], head["res_connection"]
        y, x = linears(inputs.astype(dtype), (first["weight"], around["weight"]))
        x = x + around["bias"].astype(x.dtype) + activated(y, first["bias"])
        for _ in range(num_layers - 1):
            block = head["blocks_1"]
            x = x + activated(linear(x, block["weight"]), block["bias"])
        return x

    def unembed(
        params: PyTree, k: int, target: Model, target_params: PyTree, hidden: Array
    ) -> Array:
        if not own_unembedding:
            logits: Array = target.unembed(target_params, hidden)
            return logits
        own = params[f"heads_{k}"]["lm_head"]
        return linear(hidden, own["weight"], jnp.float32) + own["bias"].astype(jnp.float32)

    return HydraHeads(
        init,
        init_cache,
        look_back,
        hidden,
        unembed,
        hidden_size,
        num_heads,
        num_layers,
        prefix,
        own_unembedding,
        vocab_size,
    )
