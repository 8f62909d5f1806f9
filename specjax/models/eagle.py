"""EAGLE's draft heads: one decoder layer over pairs of a feature and the token it led to.

EAGLE, arXiv 2401.15077, extrapolates the target's last feature f and reads its own output as the
next one. EAGLE-3, arXiv 2503.01840, starts from a mixture of three of the target's layers, and what
it passes on to itself need not resemble any of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from specjax import cache as caches
from specjax.kernels.linear import linear
from specjax.models import layers
from specjax.models.transformer import TransformerConfig
from specjax.types import Array, Block, Cache, Model, PyTree


class EagleHead(NamedTuple):
    """Pure functions of a head, which reads tokens and `hidden`: the target's, then its own."""

    init: Callable  # (rng_key) -> params
    init_cache: Callable  # (batch_size, max_length) -> Cache; slot i holds the pair of token i + 1
    fuse: Callable  # (params, target, features [B,N,F]) -> hidden [B,N,E], of the target's
    apply: Callable  # (params, hidden [B,N,E], embeddings [B,N,E], positions [B,N], mask [B,N,M],
    #                  cache, block=None) -> (hidden [B,N,E], Block); mask and block as for a Model
    logits: Callable  # (params, target, target_params, hidden [...,E]) -> [...,Vd] float32
    config: TransformerConfig  # of its layer; hidden_size and vocab_size are the target's
    bias: bool = False  # of its first projection
    feature_layers: tuple[int, ...] = ()  # read in place of the last feature, if any
    vocabulary: np.ndarray | None = None  # [Vd] ascending ids it can draft; None: all
    own_unembedding: bool = False  # has a matrix of its own in place of the target's

    def unembed(self, params: PyTree, target: Model, target_params: PyTree, hidden: Array) -> Array:
        """Logits [..., V] float32 over the target's vocabulary; -inf at what it cannot draft."""
        logits = self.logits(params, target, target_params, hidden)
        if self.vocabulary is None:
            return logits
        column = np.full(target.vocab_size, len(self.vocabulary))
        column[self.vocabulary] = np.arange(len(self.vocabulary))
        nothing = jnp.full((*logits.shape[:-1], 1), -jnp.inf)
        return jnp.concatenate([logits, nothing], -1)[..., column]


class _Linear(nn.Module):
    """A product with an optional bias, under the names that checkpoints use."""

    width: int
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal = nn.initializers.normal(0.02)
        weight = self.param("weight", normal, (self.width, x.shape[-1]), self.dtype)
        y = linear(x, weight)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.width,), self.dtype)
        return y


Fed = tuple[Array, Array, Cache, Block | None]  # positions, mask, cache, block


def _layer(
    c: TransformerConfig, dtype: Any, x: Array, residual: Array, fed: Fed
) -> tuple[Array, Block]:
    """A decoder layer, in the scope of its caller, that adds to another residual than its input."""
    positions, mask, cache, block = fed
    frequencies = layers.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    cos, sin = layers.rotation(positions, frequencies)
    out_std = 0.02 / 2**0.5
    sizes = (c.num_heads, c.num_kv_heads, c.head_dim)
    attention = layers.Attention(*sizes, out_std, dtype, name="self_attn")
    prefix = (cache.keys[0], cache.values[0], cache.length)
    earlier = None
    if block is not None:
        earlier = (block.keys[0], block.values[0])
        positions = jnp.concatenate([block.positions, positions], 1)
    y, keys, values = attention(x, None, cos, sin, mask, prefix, earlier, residual)
    norm = layers.Norm(c.norm_eps, dtype, name="post_attention_layernorm")(c.hidden_size)
    y = layers.MLP(c.intermediate_size, out_std, dtype, name="mlp")(y, norm)
    return y, Block((keys,), (values,), positions)


class _EagleLayer(nn.Module):
    """Has no norm before its attention."""

    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, fed: Fed) -> tuple[Array, Block]:
        return _layer(self.config, self.dtype, x, x, fed)


class _Eagle3Layer(nn.Module):
    """Attends from [embedding; hidden], normed each for itself, and adds to the hidden alone."""

    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden: Array, embeddings: Array, fed: Fed) -> tuple[Array, Block]:
        c = self.config
        parts = [
            layers.Norm(c.norm_eps, self.dtype, name=name)(c.hidden_size)(part)
            for name, part in (("input_layernorm", embeddings), ("hidden_norm", hidden))
        ]
        return _layer(c, self.dtype, jnp.concatenate(parts, -1), hidden, fed)


class _Eagle(nn.Module):
    config: TransformerConfig
    dtype: Any
    bias: bool

    def setup(self) -> None:
        self.fc = _Linear(self.config.hidden_size, self.bias, self.dtype)
        self.layers_0 = _EagleLayer(self.config, self.dtype)

    def fuse(self, features: Array) -> Array:
        return features

    def __call__(self, hidden: Array, embeddings: Array, *fed: Any) -> tuple[Array, Block]:
        pair = jnp.concatenate([embeddings, hidden], -1)
        found: tuple[Array, Block] = self.layers_0(self.fc(pair), _fed(*fed))
        return found

    def logits(self, hidden: Array, unembed: Callable) -> Array:
        found: Array = unembed(hidden)
        return found


class _Eagle3(nn.Module):
    config: TransformerConfig
    dtype: Any
    num_rows: int  # of an unembedding of its own; 0: it has none

    def setup(self) -> None:
        c = self.config
        self.fc = _Linear(c.hidden_size, False, self.dtype)
        self.midlayer = _Eagle3Layer(c, self.dtype)
        self.norm = layers.Norm(c.norm_eps, self.dtype)
        if self.num_rows:
            normal = nn.initializers.normal(0.02)
            self.lm_head = self.param("lm_head", normal, (self.num_rows, c.hidden_size), self.dtype)

    def fuse(self, features: Array) -> Array:
        fused: Array = self.fc(features)
        return fused

    def __call__(self, hidden: Array, embeddings: Array, *fed: Any) -> tuple[Array, Block]:
        found: tuple[Array, Block] = self.midlayer(hidden, embeddings, _fed(*fed))
        return found

    def logits(self, hidden: Array, unembed: Callable) -> Array:
        hidden = self.norm(self.config.hidden_size)(hidden)
        if self.num_rows:
            return linear(hidden, self.lm_head, jnp.float32)
        found: Array = unembed(hidden)
        return found


def _fed(positions: Array, mask: Array, cache: Cache, block: Block | None = None) -> Fed:
    return positions, mask, cache, block


def eagle_head(config: TransformerConfig, bias: bool = True, dtype: Any = jnp.float32) -> EagleHead:
    """EAGLE-1's head, which EAGLE-2 and HASS share; its output is the next feature.

    Args:
        config: of its one layer; hidden_size and vocab_size are the target's.
        bias: whether the projection of [embedding; feature] has one.
        dtype: of new parameters, activations and cache.
    """
    head = _head(_Eagle(config, dtype, bias), config, dtype)
    return head._replace(bias=bias)


def eagle3_head(
    config: TransformerConfig,
    feature_layers: tuple[int, ...],
    vocabulary: np.ndarray | None = None,
    own_unembedding: bool = False,
    dtype: Any = jnp.float32,
) -> EagleHead:
    """EAGLE-3's head, over the residuals before some of the target's layers, usually three.

    Args:
        config: of its one layer; hidden_size and vocab_size are the target's.
        feature_layers: the target's layers before which it reads the residual, `fused_layers`.
        vocabulary: [Vd] ascending target ids, the only ones it drafts; such a head has an
            unembedding of its own.
        own_unembedding: has one of its own anyway.
        dtype: of new parameters, activations and cache.

    Raises:
        ValueError: no layers; ids that are not ascending or outside the target's vocabulary.
    """
    if not feature_layers:
        raise ValueError(f"An EAGLE-3 head has feature_layers {feature_layers}; need at least one.")
    num_rows = config.vocab_size if own_unembedding else 0
    if vocabulary is not None:
        vocabulary = np.asarray(vocabulary)
        num_rows = len(vocabulary)
        inside = num_rows and vocabulary[0] >= 0 and vocabulary[-1] < config.vocab_size
        if not inside or (np.diff(vocabulary) <= 0).any():
            raise ValueError(
                f"A draft vocabulary of {num_rows} ids needs ascending ids below the "
                f"target's {config.vocab_size}."
            )
    head = _head(_Eagle3(config, dtype, num_rows), config, dtype, tuple(feature_layers))
    return head._replace(vocabulary=vocabulary, own_unembedding=bool(num_rows))


def _head(
    module: _Eagle | _Eagle3,
    c: TransformerConfig,
    dtype: Any,
    feature_layers: tuple[int, ...] = (),
) -> EagleHead:
    def init(rng_key: Array) -> PyTree:
        def everything(module: _Eagle | _Eagle3) -> Array:
            place, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1), bool)
            features = jnp.zeros((1, 1, max(1, len(feature_layers)) * c.hidden_size), dtype)
            hidden = module.fuse(features)
            hidden, _ = module(hidden, hidden, place, mask, init_cache(1, 0))
            return module.logits(hidden, lambda x: x)

        return nn.init(everything, module)(rng_key)["params"]

    def init_cache(batch_size: int, max_length: int) -> Cache:
        return caches.empty(1, (batch_size, c.num_kv_heads, max_length, c.head_dim), dtype)

    def fuse(params: PyTree, target: Model, features: Array) -> Array:
        parts = jnp.split(features, 1 + len(target.feature_layers), -1)
        read = [1 + target.feature_layers.index(layer) for layer in feature_layers] or [0]
        features = jnp.concatenate([parts[i] for i in read], -1)
        fused: Any = module.apply({"params": params}, features, method=module.fuse)
        return fused

    def apply(params: PyTree, *arrays: Any) -> tuple[Array, Block]:
        outputs: Any = module.apply({"params": params}, *arrays)
        return outputs

    def logits(params: PyTree, target: Model, target_params: PyTree, hidden: Array) -> Array:
        def unembed(hidden: Array) -> Array:
            return target.unembed(target_params, hidden)

        found: Any = module.apply({"params": params}, hidden, unembed, method=module.logits)
        return found

    return EagleHead(init, init_cache, fuse, apply, logits, c, feature_layers=feature_layers)


def check(head: EagleHead, target: Model) -> None:
    """Whether a head fits a target.

    Raises:
        ValueError: another hidden size or vocabulary, features of other layers.
    """
    c = head.config
    if (c.hidden_size, c.vocab_size) != (target.hidden_size, target.vocab_size):
        raise ValueError(
            f"The EAGLE head has hidden size {c.hidden_size} and {c.vocab_size} tokens, the target "
            f"{target.hidden_size} and {target.vocab_size}; they must be the same."
        )
    if not set(head.feature_layers) <= set(target.feature_layers):
        raise ValueError(
            f"The EAGLE-3 head reads layers {head.feature_layers} of its target, which gives "
            f"{target.feature_layers}; build it with these feature_layers."
        )


def fused_layers(num_layers: int) -> tuple[int, int, int]:
    """The layers before which EAGLE-3 reads the residual of a target that has so many.

    Raises:
        ValueError: fewer than six, of which the three would not be low, middle and high.
    """
    found = (2, num_layers // 2, num_layers - 3)
    if not found[0] < found[1] <= found[2]:
        raise ValueError(
            f"A target of {num_layers} layers has no low, middle and high one for EAGLE-3 "
            "(2, L // 2, L - 3); it needs at least 6, or feature_layers of your own."
        )
    return found
