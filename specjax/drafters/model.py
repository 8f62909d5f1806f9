"""An independent draft model of the target's vocabulary (arXiv 2211.17192, 2302.01318)."""

from typing import Any

import flax.struct as struct
import jax.numpy as jnp

from specjax import cache as caches
from specjax.drafters.grow import Builder
from specjax.types import (
    Array,
    Block,
    Cache,
    Context,
    Draft,
    Drafter,
    Keys,
    Model,
    Outcome,
    Params,
)


@struct.dataclass
class ModelDraftState:
    """The draft model has cached everything up to and including the root: `cache.length == length`.

    Holds from the first `observe` on.
    """

    cache: Cache
    logits: Array  # [B, V], the draft model's at the root


def model(draft_model: Model, build: Builder) -> Drafter:
    """Drafts with `draft_model`, whose weights are `params.drafter`.

    Args:
        draft_model: shares the target's vocabulary.
        build: the tree, `grow.static(parents, choose)` or `grow.chain(num_tokens, choose)`.
    """

    def init(batch_size: int, max_length: int) -> ModelDraftState:
        logits = jnp.zeros((batch_size, draft_model.vocab_size))
        return ModelDraftState(draft_model.init_cache(batch_size, max_length), logits)

    def propose(
        params: Params, rng_keys: Keys, state: ModelDraftState, context: Context
    ) -> tuple[Draft, ModelDraftState]:
        def expand(
            block: Block | None, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Any]:
            del parents
            positions = jnp.broadcast_to(context.length[:, None] - 1 + depth, tokens.shape)
            output, block = draft_model.apply(
                params.drafter, tokens, positions, mask, state.cache, block
            )
            return output.logits, block

        return build.grow(expand, rng_keys, context, state.logits, None), state

    def observe(
        params: Params, state: ModelDraftState, context: Context, outcome: Outcome
    ) -> ModelDraftState:
        # The news, and at the very first time the token before it too, which no observe brought.
        width = outcome.verdict.path.shape[1] + 1
        cache = caches.truncate(state.cache, context.length - outcome.verdict.num_nodes)
        count = context.length - cache.length
        place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (count.shape[0], width))
        positions = cache.length[:, None] + place
        slots = jnp.minimum(positions, context.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(context.tokens, slots, 1)
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (*tokens.shape, width))
        output, block = draft_model.apply(params.drafter, tokens, positions, causal, cache)
        newest = jnp.maximum(count - 1, 0)[:, None, None]
        final = output.features[..., : draft_model.hidden_size]
        feature = jnp.take_along_axis(final, newest, 1)[:, 0]
        logits = draft_model.unembed(params.drafter, feature)
        return ModelDraftState(
            caches.commit(cache, block, place, caches.tie(count, output.features)),
            jnp.where((count > 0)[:, None], logits, state.logits),
        )

    return Drafter(init, propose, observe, build.proposal, draft_model.vocab_size)
