"""Medusa: heads that predict several tokens ahead, each knowing nothing of the others' choices.

Cai et al., arXiv 2401.10774. The law of a node depends on its depth alone, so the whole tree costs
one pass of the heads over one feature, and a node's law given everything drawn before it is simply
its head's.
"""

from typing import Any

import flax.struct as struct
import jax.numpy as jnp

from specjax.drafters.grow import Builder
from specjax.models.medusa import MedusaHeads, check
from specjax.types import Array, Context, Draft, Drafter, Keys, Model, Outcome, Params


@struct.dataclass
class MedusaState:
    """The feature that predicted the root, zeros for a history of one token.

    Holds from the first `observe` on.
    """

    feature: Array  # [B, E], the target's final-norm output at position length - 2


def medusa(target: Model, heads: MedusaHeads, build: Builder) -> Drafter:
    """Drafts with `heads`, whose weights are `params.drafter`.

    Args:
        target: the decoder's; its features and its unembedding are read.
        heads: `models.medusa.medusa_heads`.
        build: the tree, of `grow`, at most as deep as there are heads.

    Raises:
        ValueError: heads that do not fit the target or are too few for the tree.
    """
    check("medusa", heads, target, build.proposal.depth)
    which = range(build.proposal.depth)

    def init(batch_size: int, max_length: int) -> MedusaState:
        del max_length
        return MedusaState(jnp.zeros((batch_size, heads.hidden_size)))

    def propose(
        params: Params, rng_keys: Keys, state: MedusaState, context: Context
    ) -> tuple[Draft, MedusaState]:
        hidden = heads.hidden(params.drafter, state.feature, which)
        logits = heads.unembed(params.drafter, target, params.target, hidden, which)  # [B, D, V]

        def expand(
            carry: Any, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Any]:
            del parents, mask
            level = jnp.broadcast_to(logits[:, depth, None], (*tokens.shape, logits.shape[-1]))
            return level, carry

        return build.grow(expand, rng_keys, context, logits[:, 0], None), state

    def observe(
        params: Params, state: MedusaState, context: Context, outcome: Outcome
    ) -> MedusaState:
        del params, context
        return MedusaState(newest_feature(outcome, state.feature))

    return Drafter(init, propose, observe, build.proposal, target.vocab_size)


def newest_feature(outcome: Outcome, old: Array) -> Array:
    """The final-norm output [B, E] that predicted the root; `old` in rows that gained nothing."""
    path, count = outcome.verdict.path, outcome.verdict.num_nodes[:, None]
    node = jnp.take_along_axis(path, jnp.maximum(count - 1, 0), 1)
    feature = jnp.take_along_axis(outcome.output.features, node[..., None], 1)[:, 0]
    return jnp.where(count > 0, feature[:, : old.shape[1]].astype(old.dtype), old)
