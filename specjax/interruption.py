"""A drafter that is interrupted: others' drafts are judged at first, and it has to observe them.

A drafter may share its decoder with others, be one of a cascade or be switched to when the text is
long under way. So it may not trust that the draft which it observes is its own. Here the first
steps of every row judge drafts that have nothing to do with it, as many as its weights say: the
same program runs with interruptions and without.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp

from specjax.types import Array, Context, Draft, Drafter, Keys, Outcome, Params, PyTree

MOST = 3  # interruptions
RECOVERY = 2  # steps after which a drafter is to be accepted as usual


class Interruptible(NamedTuple):
    """The weights of an interruptible drafter."""

    own: PyTree
    interruptions: Array  # int32, steps at the start of every row that judge another draft


@struct.dataclass
class InterruptedState:
    """The drafter's own state, and what steps gained once it has recovered."""

    own: PyTree
    in_step: Array  # [B] bool, whether a proposal is under way
    num_steps: Array  # [B] int32
    counted: Array  # [B] int32, steps from `MOST + RECOVERY` on
    gained: Array  # [B] int32, the tokens of these


def interruptible(drafter: Drafter) -> Drafter:
    """The same drafter, whose weights are an `Interruptible`."""
    is_chain = drafter.proposal.num_nodes == drafter.proposal.depth + 1

    def init(batch_size: int, max_length: int) -> InterruptedState:
        def zeros() -> Array:
            return jnp.zeros([batch_size], jnp.int32)

        own = drafter.init(batch_size, max_length)
        return InterruptedState(own, zeros() > 0, zeros(), zeros(), zeros())

    def propose(
        params: Params, rng_keys: Keys, state: InterruptedState, context: Context
    ) -> tuple[Draft, InterruptedState]:
        draft, own = drafter.propose(_own(params), rng_keys, state.own, context)
        other = _another(draft, context, is_chain)
        is_interrupted = state.num_steps < params.drafter.interruptions

        def either(x: Array, y: Array) -> Array:
            return jnp.where(is_interrupted.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        in_step = jnp.ones_like(state.in_step)
        return jax.tree.map(either, other, draft), dataclasses.replace(
            state, own=own, in_step=in_step
        )

    def observe(
        params: Params, state: InterruptedState, context: Context, outcome: Outcome
    ) -> InterruptedState:
        own = drafter.observe(_own(params), state.own, context, outcome)
        gained = outcome.verdict.num_nodes
        is_step = state.in_step & (gained > 0)
        counts = is_step & (state.num_steps >= MOST + RECOVERY)
        return InterruptedState(
            own,
            jnp.zeros_like(state.in_step),
            state.num_steps + is_step,
            state.counted + counts,
            state.gained + counts * gained,
        )

    return drafter._replace(init=init, propose=propose, observe=observe)


def _own(params: Params) -> Params:
    return Params(params.target, params.drafter.own)


def _another(draft: Draft, context: Context, is_chain: bool) -> Draft:
    """Tokens from all over the history, as a chain where that is promised, else as siblings."""
    node = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)
    slot = (5 * context.length[:, None] + 3 * node) % context.length[:, None]
    tokens = jnp.take_along_axis(context.tokens, slot, 1).at[:, 0].set(draft.tokens[:, 0])
    probs: Any = None
    if draft.probs is not None:
        probs = jax.nn.one_hot(tokens, draft.probs.shape[-1], dtype=draft.probs.dtype)
    parents = jnp.broadcast_to(node - 1 if is_chain else jnp.minimum(node, 1) - 1, tokens.shape)
    return Draft(tokens, parents, probs, jnp.zeros_like(draft.num_drafted), depth=draft.depth)
