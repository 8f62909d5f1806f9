"""Hydra: heads that read the feature before the root and the path from the root.

Ankner et al., arXiv 2402.05109. A node's law depends on its ancestors, as a model's would; the
heads read their embeddings and attend to nothing. With a prefix layer (Hydra++) the feature is that
layer's output, which has seen the features of all of the text.
"""

import flax.struct as struct
import jax.numpy as jnp

from specjax import cache as caches
from specjax import trees
from specjax.drafters.grow import Builder
from specjax.drafters.medusa import newest_feature
from specjax.models.hydra import HydraHeads
from specjax.models.medusa import check
from specjax.types import Array, Cache, Context, Draft, Drafter, Keys, Model, Outcome, Params


@struct.dataclass
class HydraState:
    """The prefix layer has cached everything before the root, as the target has.

    `cache.length == length - 1`, slot == position.
    """

    feature: Array  # [B, E], what the heads read of position length - 2; zeros at length 1
    cache: Cache | None  # None without a prefix layer


def hydra(target: Model, heads: HydraHeads, build: Builder) -> Drafter:
    """Drafts with `heads`, whose weights are `params.drafter`.

    Args:
        target: the decoder's; its features, embedding and unembedding are read.
        heads: `models.hydra.hydra_heads`.
        build: the tree, of `grow`, at most as deep as there are heads.

    Raises:
        ValueError: heads that do not fit the target or are too few for the tree.
    """
    check("hydra", heads, target, build.proposal.depth)

    def init(batch_size: int, max_length: int) -> HydraState:
        return HydraState(
            jnp.zeros((batch_size, heads.hidden_size)),
            None if heads.prefix is None else heads.init_cache(batch_size, max_length),
        )

    def propose(
        params: Params, rng_keys: Keys, state: HydraState, context: Context
    ) -> tuple[Draft, HydraState]:
        def read(inputs: Array, tokens: Array) -> Array:
            embeddings = target.embed(params.target, tokens)
            return jnp.concatenate([inputs, embeddings.astype(inputs.dtype)], -1)

        def predict(k: int, inputs: Array) -> Array:
            hidden = heads.hidden(params.drafter, k, inputs)
            logits: Array = heads.unembed(params.drafter, k, target, params.target, hidden)
            return logits

        def expand(
            carry: Array, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Array]:
            del mask
            inputs = read(jnp.take_along_axis(carry, parents[..., None], 1), tokens)
            return predict(depth, inputs), inputs

        inputs = read(state.feature[:, None], trees.root(context))  # [B, W, (k + 2) E] for head k
        logits = predict(0, inputs)[:, 0]
        return build.grow(expand, rng_keys, context, logits, inputs), state

    def observe(
        params: Params, state: HydraState, context: Context, outcome: Outcome
    ) -> HydraState:
        if state.cache is None:
            return HydraState(newest_feature(outcome, state.feature), None)
        path, count = outcome.verdict.path, outcome.verdict.num_nodes
        width = path.shape[1]
        cache = caches.truncate(state.cache, context.length - count - 1)
        features = outcome.output.features[..., : heads.hidden_size]
        place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), path.shape)
        states, block = heads.look_back(
            params.drafter,
            jnp.take_along_axis(features, path[..., None], 1),
            cache.length[:, None] + place,
            jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (*path.shape, width)),
            cache,
        )
        newest = jnp.take_along_axis(states, jnp.maximum(count - 1, 0)[:, None, None], 1)[:, 0]
        return HydraState(
            jnp.where((count > 0)[:, None], newest.astype(state.feature.dtype), state.feature),
            caches.commit(cache, block, place, caches.tie(count, states)),
        )

    return Drafter(init, propose, observe, build.proposal, target.vocab_size)
