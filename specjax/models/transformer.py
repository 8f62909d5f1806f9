"""The Llama 2/3 family as a `Model`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct as struct
import jax
import jax.numpy as jnp

from specjax import cache as caches
from specjax.kernels.linear import RMSNorm, linear
from specjax.models import layers
from specjax.types import Array, Block, Cache, Model, ModelOutput, PyTree, Stack


@struct.dataclass
class TransformerConfig:
    """Shape of a model. Static throughout, hence hashable."""

    vocab_size: int = struct.field(pytree_node=False)
    hidden_size: int = struct.field(pytree_node=False)
    intermediate_size: int = struct.field(pytree_node=False)
    num_layers: int = struct.field(pytree_node=False)
    num_heads: int = struct.field(pytree_node=False)
    num_kv_heads: int = struct.field(pytree_node=False)
    head_dim: int = struct.field(pytree_node=False)
    max_position_embeddings: int = struct.field(pytree_node=False, default=2048)
    rope_theta: float = struct.field(pytree_node=False, default=10000.0)
    rope_scaling: layers.RopeScaling | None = struct.field(pytree_node=False, default=None)
    rms_norm_eps: float = struct.field(pytree_node=False, default=1e-5)
    tie_embeddings: bool = struct.field(pytree_node=False, default=True)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        mask: Array,
        prefix: tuple[Array, Array, Array],
        block: tuple[Array, Array] | None,
    ) -> tuple[Array, Array, Array]:
        c = self.config
        out_std = 0.02 / (2 * c.num_layers) ** 0.5  # keeps the residual's variance at init

        def norm(name: str) -> RMSNorm:
            return layers.Norm(c.rms_norm_eps, self.dtype, name=name)(c.hidden_size)

        attention = layers.Attention(
            c.num_heads, c.num_kv_heads, c.head_dim, out_std, self.dtype, name="self_attn"
        )
        mlp = layers.GatedMLP(c.intermediate_size, out_std, self.dtype, name="mlp")
        before, between = norm("input_layernorm"), norm("post_attention_layernorm")
        x, keys, values = attention(x, before, cos, sin, mask, prefix, block)
        return mlp(x, between), keys, values


class Transformer(nn.Module):
    """The stack: embedding, layers, final norm, head."""

    config: TransformerConfig
    dtype: jnp.dtype
    feature_layers: tuple[int, ...] = ()
    remat: bool = False
    only: tuple[int, ...] | None = None  # these layers; by default all

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache,
        block: Block | None = None,
        gates: Array | None = None,  # [L] bool
    ) -> tuple[ModelOutput, Block]:
        c, normal = self.config, nn.initializers.normal(0.02)
        embedding = self.param("embed_tokens", normal, (c.vocab_size, c.hidden_size), self.dtype)
        # Tied to the tokens, none of which is negative: if the angles of all passes of a step were
        # ready at once, XLA on CPU would wake another thread for them and wait for it.
        cos, sin = layers.rotation(
            jnp.where(tokens < 0, 0, positions),
            layers.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling),
        )
        x = layers.embed(embedding, tokens).astype(self.dtype)
        keys, values, residuals = [], [], []
        layer_of: Any = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        for place, i in enumerate(range(c.num_layers) if self.only is None else self.only):
            residuals.append(x)
            x, k, v = layer_of(c, self.dtype, name=f"layers_{i}")(
                x,
                cos,
                sin,
                mask,
                (cache.keys[place], cache.values[place], cache.length),
                None if block is None else (block.keys[place], block.values[place]),
            )
            if gates is not None:
                x = jnp.where(gates[place], x, residuals[-1])
            keys.append(k)
            values.append(v)
        norm = layers.Norm(c.rms_norm_eps, self.dtype, name="norm")(c.hidden_size)
        head = embedding
        if not c.tie_embeddings:
            head = self.param("lm_head", normal, (c.vocab_size, c.hidden_size), self.dtype)
        if block is not None:
            positions = jnp.concatenate([block.positions, positions], 1)
        output = ModelOutput(
            logits=linear(x, head, jnp.float32, norm=norm),
            features=jnp.concatenate([norm(x)] + [residuals[i] for i in self.feature_layers], -1),
        )
        return output, Block(tuple(keys), tuple(values), positions)


def transformer(
    config: TransformerConfig,
    dtype: jnp.dtype = jnp.float32,
    feature_layers: tuple[int, ...] = (),
    cache_dtype: jnp.dtype | None = None,
    remat: bool = False,
) -> Model:
    """Builds the model's pure functions.

    Args:
        config: its shape.
        dtype: of new parameters, activations and cache; norms, softmax and logits are float32
            anyway. Parameters may be of fewer bits than activations, matrices `Int8`.
        feature_layers: layers whose input residual joins `ModelOutput.features`.
        cache_dtype: of the cache, if another; keys and values are rounded to it at once, so a
            token's result does not depend on whether its history is in the cache already.
        remat: in training, computes each layer again in the backward pass instead of keeping what
            it computed on the way.

    Raises:
        ValueError: heads that cannot be grouped, an odd head size, a layer that does not exist.
    """
    c = config
    if c.num_heads % c.num_kv_heads:
        raise ValueError(
            f"{c.num_heads} query heads cannot share {c.num_kv_heads} key/value heads; "
            "the first must be a multiple of the second."
        )
    if c.head_dim % 2:
        raise ValueError(f"Head size {c.head_dim} is odd; rotary embedding needs pairs.")
    for layer in feature_layers:
        if not 0 <= layer < c.num_layers:
            raise ValueError(f"Feature layer {layer} does not exist; the model has {c.num_layers}.")
    module = Transformer(config, dtype, feature_layers, remat)

    def init(rng_key: Array) -> PyTree:
        token = jnp.zeros((1, 1), jnp.int32)
        mask = jnp.ones((1, 1, 1), bool)
        return module.init(rng_key, token, token, mask, init_cache(1, 0))["params"]

    def init_cache(batch_size: int, max_length: int, num_layers: int = c.num_layers) -> Cache:
        shape = (batch_size, c.num_kv_heads, max_length, c.head_dim)
        return caches.empty(num_layers, shape, cache_dtype or dtype)

    def applying(module: Transformer) -> Callable:
        def apply(
            params: PyTree,
            tokens: Array,
            positions: Array,
            mask: Array,
            cache: Cache,
            block: Block | None = None,
        ) -> tuple[ModelOutput, Block]:
            outputs: Any = module.apply({"params": params}, tokens, positions, mask, cache, block)
            return outputs

        return apply

    def embed(params: PyTree, tokens: Array) -> Array:
        return layers.embed(params["embed_tokens"], tokens).astype(dtype)

    def unembed(params: PyTree, hidden: Array) -> Array:
        head = params["embed_tokens" if c.tie_embeddings else "lm_head"]
        return linear(hidden, head, jnp.float32)

    def only(which: Sequence[int]) -> Model:
        chosen = tuple(int(layer) for layer in which)
        exist = chosen and chosen[0] >= 0 and chosen[-1] < c.num_layers
        if not exist or list(chosen) != sorted(set(chosen)):
            raise ValueError(
                f"Layers {chosen} were chosen; need one at least, in order, of the model's 0 to "
                f"{c.num_layers - 1}."
            )
        return whole._replace(
            init_cache=partial(init_cache, num_layers=len(chosen)),
            apply=applying(Transformer(config, dtype, (), remat, chosen)),
            feature_layers=(),
            stack=None,
        )

    def gated(
        gates: Array,
        params: PyTree,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache,
        block: Block | None = None,
    ) -> tuple[ModelOutput, Block]:
        of_model = {"params": params}
        outputs: Any = module.apply(of_model, tokens, positions, mask, cache, block, gates)
        return outputs

    def attention(
        params: PyTree, tokens: Array, positions: Array, mask: Array, cache: Cache
    ) -> tuple[Array, ...]:
        of_model = {"params": params}
        outputs: Any = module.apply(
            of_model, tokens, positions, mask, cache, mutable=["intermediates"]
        )
        (_, block), aside = outputs
        frequencies = layers.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        cos, sin = layers.rotation(positions, frequencies)

        def weight(i: int) -> Array:
            (queries,) = aside["intermediates"][f"layers_{i}"]["self_attn"]["queries"]
            prefix = cache.keys[i], cache.length
            return layers.attention_weight(queries, cos, sin, mask, prefix, block.keys[i])

        return tuple(map(weight, range(c.num_layers)))

    whole = Model(
        init,
        init_cache,
        applying(module),
        embed,
        unembed,
        c.vocab_size,
        c.hidden_size,
        tuple(feature_layers),
        Stack(c.num_layers, only, gated, attention),
    )
    return whole


def forward(model: Model, params: PyTree, tokens: Array) -> ModelOutput:
    """One causal pass over whole sequences [B, N] without a cache, as training does."""
    b, n = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (b, n))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (b, n, n))
    return model.apply(params, tokens, positions, mask, model.init_cache(b, 0))[0]


def num_params(params: PyTree) -> int:
    """Number of weights."""
    return sum(x.size for x in jax.tree.leaves(params))
