"""Decoders of several families as a `Model`: what they differ in is `families.FAMILIES`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct as struct
import jax
import jax.numpy as jnp

from specjax import cache as caches
from specjax.kernels.attention import capped
from specjax.kernels.linear import Norm, Weights, linear
from specjax.models import layers
from specjax.models.families import FAMILIES
from specjax.types import Array, Block, Cache, Model, ModelOutput, PyTree, Stack


@struct.dataclass
class TransformerConfig:
    """Family and numbers of a model. Static throughout, hence hashable."""

    vocab_size: int = struct.field(pytree_node=False)
    hidden_size: int = struct.field(pytree_node=False)
    intermediate_size: int = struct.field(pytree_node=False)  # of each expert, where there are any
    num_layers: int = struct.field(pytree_node=False)
    num_heads: int = struct.field(pytree_node=False)
    num_kv_heads: int = struct.field(pytree_node=False)
    head_dim: int = struct.field(pytree_node=False)
    max_position_embeddings: int = struct.field(pytree_node=False, default=2048)
    rope_theta: float = struct.field(pytree_node=False, default=10000.0)
    rope_scaling: layers.RopeScaling | layers.LinearRopeScaling | None = struct.field(
        pytree_node=False, default=None
    )
    norm_eps: float = struct.field(pytree_node=False, default=1e-5)
    tie_embeddings: bool = struct.field(pytree_node=False, default=True)
    family: str = struct.field(pytree_node=False, default="llama")  # one of FAMILIES
    # How many tokens each layer sees, itself included; 0 is all. Empty: all layers see all.
    windows: tuple[int, ...] = struct.field(pytree_node=False, default=())
    local_rope_theta: float | None = struct.field(pytree_node=False, default=None)  # with a window
    attention_scale: float | None = struct.field(pytree_node=False, default=None)  # H^-0.5
    attention_softcap: float | None = struct.field(pytree_node=False, default=None)
    logit_softcap: float | None = struct.field(pytree_node=False, default=None)
    num_experts: int = struct.field(pytree_node=False, default=0)
    num_experts_per_token: int = struct.field(pytree_node=False, default=0)
    renormalized_experts: bool = struct.field(pytree_node=False, default=True)


class Sight(NamedTuple):
    """Where new tokens stand and what they see, as a layer's attention is told."""

    cos: Array  # [B, N, H / 2]
    sin: Array
    mask: Array  # [B, N, M]
    skip: Array | None  # [B, N], see `attend`


class DecoderLayer(nn.Module):
    """Attention and feed-forward with residuals, each after a norm."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        sight: Sight,
        prefix: tuple[Array, Array, Array],
        block: tuple[Array, Array] | None,
    ) -> tuple[Array, Array, Array]:
        c, dtype = self.config, self.dtype
        family = FAMILIES[c.family]
        out_std = 0.02 / (2 * c.num_layers) ** 0.5  # keeps the residual's variance at init

        def norm(name: str) -> layers.Norm:
            return layers.Norm(c.norm_eps, dtype, family.norm_offset, family.layer_norm, name=name)

        def norm_of(name: str) -> Norm:
            return norm(name)(c.hidden_size)

        attention = layers.Attention(
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            out_std,
            dtype,
            family.biases,
            norm if family.qk_norm else None,
            c.attention_scale,
            c.attention_softcap,
            name="self_attn",
        )
        mlp: layers.MLP | layers.Experts
        if c.num_experts:
            choice = c.num_experts, c.num_experts_per_token, c.renormalized_experts
            mlp = layers.Experts(*choice, c.intermediate_size, out_std, dtype, name="mlp")
        else:
            kind = family.activation, family.gated, family.biases
            mlp = layers.MLP(c.intermediate_size, out_std, dtype, *kind, name="mlp")
        before = norm_of("input_layernorm")
        if not family.post_norms:
            between = norm_of("post_attention_layernorm")  # a name from when there were no others
            x, keys, values = attention(x, before, *sight[:3], prefix, block, skip=sight.skip)
            return mlp(x, between), keys, values
        after = norm_of("post_attention_layernorm")
        x, keys, values = attention(
            x, before, *sight[:3], prefix, block, post=after, skip=sight.skip
        )
        around = norm_of("pre_feedforward_layernorm"), norm_of("post_feedforward_layernorm")
        return mlp(x, *around), keys, values


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
        tied = jnp.where(tokens < 0, 0, positions)
        x = _embedded(c, embedding, tokens, self.dtype)
        if FAMILIES[c.family].learned_positions:
            shape = (c.max_position_embeddings, c.hidden_size)
            table = self.param("embed_positions", normal, shape, self.dtype)
            x = x + layers.embed(table, tied).astype(self.dtype)
        at = positions if block is None else jnp.concatenate([block.positions, positions], 1)
        sights = {w: sight(c, w, tied, mask, cache.length, at) for w in {*c.windows} or {0}}
        keys, values, residuals = [], [], []
        layer_of: Any = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        for place, i in enumerate(range(c.num_layers) if self.only is None else self.only):
            residuals.append(x)
            x, k, v = layer_of(c, self.dtype, name=f"layers_{i}")(
                x,
                sights[c.windows[i] if c.windows else 0],
                (cache.keys[place], cache.values[place], cache.length),
                None if block is None else (block.keys[place], block.values[place]),
            )
            if gates is not None:
                x = jnp.where(gates[place], x, residuals[-1])
            keys.append(k)
            values.append(v)
        family = FAMILIES[c.family]
        norm = layers.Norm(
            c.norm_eps, self.dtype, family.norm_offset, family.layer_norm, name="norm"
        )(c.hidden_size)
        head = embedding
        if not c.tie_embeddings:
            head = self.param("lm_head", normal, (c.vocab_size, c.hidden_size), self.dtype)
        output = ModelOutput(
            logits=capped(linear(x, head, jnp.float32, norm=norm), c.logit_softcap),
            features=jnp.concatenate([norm(x)] + [residuals[i] for i in self.feature_layers], -1),
        )
        return output, Block(tuple(keys), tuple(values), at)


def _embedded(c: TransformerConfig, table: Weights, tokens: Array, dtype: jnp.dtype) -> Array:
    x = layers.embed(table, tokens).astype(dtype)
    if FAMILIES[c.family].scaled_embedding:
        x = x * jnp.asarray(c.hidden_size**0.5, dtype)
    return x


def sight(
    c: TransformerConfig,
    window: int,
    positions: Array,
    mask: Array,
    length: Array,
    block_positions: Array,
) -> Sight:
    """What a layer of a window is told about new tokens.

    Args:
        c: the model's.
        window: 0 is none.
        positions: [B, N], of the new tokens.
        mask: [B, N, M].
        length: [B], of the prefix.
        block_positions: [B, M], the new tokens included.
    """
    if FAMILIES[c.family].learned_positions:
        angle = jnp.zeros((*positions.shape, c.head_dim // 2))
        cos, sin = jnp.cos(angle), jnp.sin(angle)  # no rotation at all
    else:
        theta, scaling = c.rope_theta, c.rope_scaling
        if window and c.local_rope_theta is not None:
            theta, scaling = c.local_rope_theta, None
        frequencies = layers.rope_frequencies(c.head_dim, theta, scaling)
        cos, sin = layers.rotation(positions, frequencies)
    if not window or window >= c.max_position_embeddings:
        return Sight(cos, sin, mask, None)
    oldest = positions - window + 1  # in sight
    before = jnp.clip(oldest, 0, length[:, None])  # slots of the prefix are positions
    among = (mask & (block_positions[:, None] < oldest[..., None])).sum(-1, dtype=jnp.int32)
    return Sight(cos, sin, mask, before + among)


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
        ValueError: heads that cannot be grouped, an odd head size, a layer that does not exist,
            a family that is not known, more experts taken than there are.
    """
    c = config
    if c.num_heads % c.num_kv_heads:
        raise ValueError(
            f"{c.num_heads} query heads cannot share {c.num_kv_heads} key/value heads; "
            "the first must be a multiple of the second."
        )
    if c.head_dim % 2:
        raise ValueError(f"Head size {c.head_dim} is odd; rotary embedding needs pairs.")
    if c.family not in FAMILIES:
        raise ValueError(f"Family {c.family!r} is not known; need one of {', '.join(FAMILIES)}.")
    if len(c.windows) not in (0, c.num_layers):
        raise ValueError(f"{len(c.windows)} windows for {c.num_layers} layers; need one each.")
    if c.num_experts and not 1 <= c.num_experts_per_token <= c.num_experts:
        raise ValueError(
            f"{c.num_experts_per_token} of {c.num_experts} experts per token; need 1 to all."
        )
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
        return _embedded(c, params["embed_tokens"], tokens, dtype)

    def unembed(params: PyTree, hidden: Array) -> Array:
        head = params["embed_tokens" if c.tie_embeddings else "lm_head"]
        return capped(linear(hidden, head, jnp.float32), c.logit_softcap)

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
        cos, sin, *_ = sight(c, 0, positions, mask, cache.length, positions)

        def weight(i: int) -> Array:
            (queries,) = aside["intermediates"][f"layers_{i}"]["self_attn"]["queries"]
            prefix = cache.keys[i], cache.length
            return layers.attention_weight(
                queries, cos, sin, mask, prefix, block.keys[i], c.attention_softcap
            )

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
        # Slots that a window hides have no weight worth telling.
        Stack(c.num_layers, only, gated, None if any(c.windows) else attention),
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
