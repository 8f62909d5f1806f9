"""A draft model that is itself decoded speculatively, to any depth.

Staged speculative decoding (Spector and Re, arXiv 2308.04623), the vertical cascade of CS-Drafting
(arXiv 2312.11462) and TriForce's hierarchy (arXiv 2404.11912): a small drafter guesses for a middle
model, whose own decoder keeps what the middle model would have written, and that is the draft for
the target. A lossless inner decoder writes samples of the middle model, so its law is the middle
model's. The inner decoder may have a cascade for a drafter in turn.
"""

import dataclasses
from typing import Any

import flax.struct as struct
import jax
import jax.numpy as jnp
from jax import lax

from specjax import cache as caches
from specjax import trees
from specjax.kernels.vocabulary import softmax
from specjax.sampling import private_keys, sampling
from specjax.types import (
    Array,
    Cache,
    Context,
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Keys,
    Outcome,
    Params,
    Proposal,
    PyTree,
)


@struct.dataclass
class CascadeState:
    """What the inner decoder knows besides the context that it shares with the outer one.

    After `propose` it has seen drafted tokens, too; `observe` takes it back to what is history.
    Then its cache, as a target's, holds everything before the root: `cache.length == length - 1`.
    """

    cache: Cache  # the middle model's
    drafter: PyTree


def cascade(inner: Decoder, num_tokens: int) -> Drafter:
    """Drafts a chain of what `inner` writes, whose weights are `params.drafter`, a `Params`.

    Args:
        inner: from `engine.decoder`, without EOS: the outer one looks for it. Its sampling
            parameters are the outer row's. If it is not lossless its tokens are point masses.
        num_tokens: drafted in every step.

    Raises:
        ValueError: fewer than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"A cascade of {num_tokens} tokens has nothing to draft; need at least 1.")
    is_coupled = inner.drafter_invariant or inner.proposal.law == "coupled"
    law = "point" if not inner.lossless else "coupled" if is_coupled else "chain"

    def at(length: Array, rng_keys: Any, state: CascadeState, context: Context) -> DecodeState:
        """The inner decoder at a length [B] of the outer text."""
        cache = caches.truncate(state.cache, length - 1)
        end = jnp.minimum(context.limit, context.tokens.shape[1])
        return DecodeState(
            context=dataclasses.replace(context, length=length, cache=cache),
            drafter=state.drafter,
            rng_keys=rng_keys,
            done=length >= end,
            num_steps=jnp.zeros_like(length),
        )

    def init(batch_size: int, max_length: int) -> CascadeState:
        zeros = jnp.zeros([batch_size], jnp.int32)
        rng_keys = jax.random.split(jax.random.key(0), batch_size)
        state = inner.init(rng_keys, sampling(batch_size), zeros, zeros, max_length)
        return CascadeState(state.context.cache, state.drafter)

    def propose(
        params: Params, rng_keys: Keys, state: CascadeState, context: Context
    ) -> tuple[Draft, CascadeState]:
        b, v = context.length.shape[0], inner.vocab_size
        # The inner decoder's roots are outer positions, too: its private stream is another one in
        # every outer step, or the next step would draw from the same keys again.
        private = private_keys(rng_keys, context, "cascade")
        keys = dataclasses.replace(rng_keys, private=private)

        def unfinished(carry: tuple) -> Array:
            state, count, *_ = carry
            return (~state.done & (count < num_tokens)).any()

        def step(carry: tuple) -> tuple:
            state, count, tokens, laws = carry
            # A row that has its tokens waits for the others.
            waits = count >= num_tokens
            still = dataclasses.replace(state, done=state.done | waits)
            after, info = inner.step(params.drafter, still)
            gained = jnp.minimum(info.num_tokens, num_tokens - count)
            tokens = caches.write(tokens, info.tokens, count, gained)
            if law != "point":
                laws = caches.write(laws, info.warped_logits, count, gained)
            return after, count + gained, tokens, laws

        zeros = jnp.zeros([b], jnp.int32)
        fillers = jnp.broadcast_to(trees.root(context), (b, num_tokens))
        hot = jax.nn.one_hot(fillers, v, dtype=bool)
        laws = jnp.where(hot, 0.0, -jnp.inf) if law != "point" else jnp.zeros((b, 0))
        start = at(context.length, keys, state, context)
        after, count, tokens, laws = lax.while_loop(unfinished, step, (start, zeros, fillers, laws))
        probs = None
        if law != "point":
            probs = jnp.pad(softmax(laws), ((0, 0), (1, 0), (0, 0)))
        draft = trees.chain(jnp.concatenate([trees.root(context), tokens], 1), probs, count)
        return draft, CascadeState(after.context.cache, after.drafter)

    def observe(
        params: Params, state: CascadeState, context: Context, outcome: Outcome
    ) -> CascadeState:
        count = outcome.verdict.num_nodes
        old = context.length - count
        place = jnp.arange(outcome.verdict.path.shape[1], dtype=jnp.int32)
        slots = jnp.minimum(old[:, None] + place, context.tokens.shape[1] - 1)
        news = jnp.take_along_axis(context.tokens, slots, 1)
        forced = inner.force(params.drafter, at(old, (), state, context), news, count)
        return CascadeState(forced.context.cache, forced.drafter)

    proposal = Proposal(law, num_tokens + 1, num_tokens)
    return Drafter(init, propose, observe, proposal, inner.vocab_size)
