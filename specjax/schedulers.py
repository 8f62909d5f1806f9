"""Which way of drafting the next step takes, chosen while decoding.

Shapes stay static: every choice is a decoder of its own, compiled into one step, and the state is
that of all of them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct as struct
import jax
import jax.numpy as jnp
from jax import lax

from specjax.types import (
    Array,
    Decoder,
    DecodeState,
    Params,
    Proposal,
    PyTree,
    Sampling,
    StepInfo,
)


@struct.dataclass
class SwitchState:
    """What the drafters believe, and how well each decoder has done in each row."""

    drafter: PyTree
    tokens_per_step: Array  # [B, A] float32, a running mean; at first as many as there could be


def switch(
    decoders: Sequence[Decoder],
    costs: Sequence[float],
    memory: float = 0.9,
    doubt: float = 0.01,
) -> Decoder:
    """Takes every step with the decoder that has lately gained most for what its steps cost.

    All rows of a batch step together: the choice is that of their mean, so which drafter a row gets
    depends on its neighbours. Under `match` its text does not; under other rules it keeps its law,
    but not its tokens.

    An estimate starts at the most that a step could gain, so that every decoder is tried, and that
    of a decoder which is not chosen goes slowly back there, so that it is tried again.

    Args:
        decoders: of one target and one state: with one drafter of several trees, or with
            `alternate(i, drafters)` for each i.
        costs: what a step of each costs, in any unit.
        memory: share of the running mean that a step leaves.
        doubt: share by which estimates of decoders that were not chosen return.

    Raises:
        ValueError: no decoder; costs that are not as many, or not positive; shares not in [0, 1].
    """
    if not decoders or len(costs) != len(decoders) or min(costs) <= 0:
        raise ValueError(
            f"There are {len(decoders)} decoders with costs {tuple(costs)}; need at least 1, each "
            "with a cost above 0."
        )
    if not (0 <= memory <= 1 and 0 <= doubt <= 1):
        raise ValueError(f"memory is {memory} and doubt {doubt}; both must lie in [0, 1].")
    proposals = [decoder.proposal for decoder in decoders]
    laws = {proposal.law for proposal in proposals}
    depth = max(proposal.depth for proposal in proposals)
    num_nodes = max(proposal.num_nodes for proposal in proposals)
    first = decoders[0]
    law = first.proposal.law if len(laws) == 1 else "coupled" if "coupled" in laws else "general"
    most = jnp.asarray([proposal.depth + 1.0 for proposal in proposals])

    def init(
        rng_keys: Array, sampling: Sampling, first_tokens: Array, limit: Array, max_length: int
    ) -> DecodeState:
        state = first.init(rng_keys, sampling, first_tokens, limit, max_length)
        estimates = jnp.broadcast_to(most, (first_tokens.shape[0], len(decoders)))
        return dataclasses.replace(state, drafter=SwitchState(state.drafter, estimates))

    def force(params: Params, state: DecodeState, tokens: Array, num_tokens: Array) -> DecodeState:
        inner = dataclasses.replace(state, drafter=state.drafter.drafter)
        inner = first.force(params, inner, tokens, num_tokens)
        return dataclasses.replace(
            inner, drafter=dataclasses.replace(state.drafter, drafter=inner.drafter)
        )

    def step(params: Params, state: DecodeState) -> tuple[DecodeState, StepInfo]:
        estimates, active = state.drafter.tokens_per_step, ~state.done[:, None]
        worth = (estimates * active).sum(0) / jnp.asarray(costs)
        chosen = jnp.argmax(worth)
        inner = dataclasses.replace(state, drafter=state.drafter.drafter)

        def taking(decoder: Decoder) -> Callable:
            def take(carry: tuple) -> tuple:
                state, info = decoder.step(params, carry[1])
                return jnp.bool_(False), state, _widened(info, depth + 1)

            return take

        info = jax.eval_shape(taking(first), (True, inner))[2]
        info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)
        for i, decoder in enumerate(decoders):
            # A choice, as a loop of at most one round: XLA writes a loop's caches in place, but
            # copies those that a conditional returns.
            start = (chosen == i, inner, info)
            _, inner, info = lax.while_loop(lambda c: c[0], taking(decoder), start)
        gained = info.num_tokens[:, None].astype(jnp.float32)
        seen = memory * estimates + (1 - memory) * gained
        unseen = estimates + doubt * (most - estimates)
        is_chosen = jnp.arange(len(decoders)) == chosen
        estimates = jnp.where(active, jnp.where(is_chosen, seen, unseen), estimates)
        return dataclasses.replace(inner, drafter=SwitchState(inner.drafter, estimates)), info

    return Decoder(
        init,
        force,
        step,
        Proposal(law, num_nodes, depth),
        all(decoder.lossless for decoder in decoders),
        first.vocab_size,
        all(decoder.drafter_invariant for decoder in decoders),
    )


def _widened(info: StepInfo, width: int) -> StepInfo:
    """The same as though its paths were `width` long."""

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, width - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

    tokens, logits, warped = (pad(x) for x in (info.tokens, info.logits, info.warped_logits))
    return dataclasses.replace(info, tokens=tokens, logits=logits, warped_logits=warped)
