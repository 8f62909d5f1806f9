"""EAGLE: a head that continues the target's own features (arXiv 2401.15077, 2503.01840).

With `grow.static` this is EAGLE-1's tree, with `grow.dynamic` EAGLE-2's (arXiv 2406.16858); a chain
drawn from the head has its exact conditional law.
"""

from typing import Any

import flax.struct as struct
import jax.numpy as jnp

from specjax import cache as caches
from specjax.drafters.grow import Builder
from specjax.models import eagle as heads
from specjax.models.eagle import EagleHead
from specjax.types import (
    Array,
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
class EagleState:
    """The head has cached the pair of every token from the second to the root.

    The pair of the token at position i, which is (the feature that predicted it, its embedding),
    lies in slot i - 1, so `cache.length == length - 1`. Holds from the first `observe` on. A
    history of one token has no pair yet: its logits are zeros.
    """

    cache: Cache
    hidden: Array  # [B, E], the head's output at the root
    logits: Array  # [B, V], of the token after the root


def eagle(target: Model, head: EagleHead, build: Builder) -> Drafter:
    """Drafts with `head`, whose weights are `params.drafter`.

    Args:
        target: the decoder's; its features, embedding and unembedding are read.
        head: `models.eagle.eagle_head` or `models.eagle.eagle3_head`.
        build: the tree, of `grow`.

    Raises:
        ValueError: the head does not fit the target.
    """
    heads.check(head, target)

    def init(batch_size: int, max_length: int) -> EagleState:
        return EagleState(
            head.init_cache(batch_size, max_length),
            jnp.zeros((batch_size, head.config.hidden_size)),
            jnp.zeros((batch_size, target.vocab_size)),
        )

    def unembed(params: Params, hidden: Array) -> Array:
        return head.unembed(params.drafter, target, params.target, hidden)

    def propose(
        params: Params, rng_keys: Keys, state: EagleState, context: Context
    ) -> tuple[Draft, EagleState]:
        def expand(
            carry: Any, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Any]:
            above, block = carry
            above = jnp.take_along_axis(above, parents[..., None], 1)
            embeddings = target.embed(params.target, tokens)
            position = context.length[:, None] - 2 + depth
            positions = jnp.broadcast_to(position, tokens.shape)
            hidden, block = head.apply(
                params.drafter, above, embeddings, positions, mask, state.cache, block
            )
            return unembed(params, hidden), (hidden, block)

        carry = (state.hidden[:, None], None)
        return build.grow(expand, rng_keys, context, state.logits, carry), state

    def observe(
        params: Params, state: EagleState, context: Context, outcome: Outcome
    ) -> EagleState:
        path, count = outcome.verdict.path, outcome.verdict.num_nodes
        width = path.shape[1]
        cache = caches.truncate(state.cache, context.length - count - 1)
        place = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), path.shape)
        slots = context.length[:, None] - count[:, None] + place  # of the new tokens
        slots = jnp.minimum(slots, context.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(context.tokens, slots, 1)
        features = jnp.take_along_axis(outcome.output.features, path[..., None], 1)
        hidden, block = head.apply(
            params.drafter,
            head.fuse(params.drafter, target, features),
            target.embed(params.target, tokens),
            cache.length[:, None] + place,
            jnp.broadcast_to(jnp.tril(jnp.ones((width, width), bool)), (*path.shape, width)),
            cache,
        )
        newest = jnp.maximum(count - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, newest, 1)[:, 0]
        gained = (count > 0)[:, None]
        return EagleState(
            caches.commit(cache, block, place, caches.tie(count, hidden)),
            jnp.where(gained, last, state.hidden),
            jnp.where(gained, unembed(params, last), state.logits),
        )

    return Drafter(init, propose, observe, build.proposal, target.vocab_size)
