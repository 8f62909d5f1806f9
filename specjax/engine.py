"""One step for every method: propose, score, verify, cut, absorb; and the loop around it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from specjax import cache as caches
from specjax import sampling as samplers
from specjax import trees
from specjax.types import (
    Array,
    Block,
    Context,
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Model,
    ModelOutput,
    Outcome,
    Params,
    PyTree,
    Sampling,
    StepInfo,
    Verdict,
    Verifier,
)

PROMPT_CHUNK = 64  # tokens of a prompt absorbed by one pass


def decoder(
    target: Model,
    drafter: Drafter,
    verifier: Verifier,
    warp: Callable = samplers.warp,
    eos_ids: Sequence[int] = (),
) -> Decoder:
    """Joins a target, a drafter and a verifier.

    Args:
        target: the model whose law the output follows.
        drafter: guesses.
        verifier: keeps.
        warp: (logits [B, N, V], sampling) -> log-weights of the law to sample from.
        eos_ids: tokens that end a row.

    Raises:
        ValueError: the verifier is not lossless for the drafter's law, or vocabularies differ.
    """
    if not set(drafter.proposal.laws) & set(verifier.laws):
        raise ValueError(
            f"The drafter proposes law {drafter.proposal.law!r} but the verifier is lossless for "
            f"{', '.join(verifier.laws)} only; choose another verifier."
        )
    if drafter.vocab_size not in (None, target.vocab_size):
        raise ValueError(
            f"The drafter's vocabulary has {drafter.vocab_size} tokens and the target's "
            f"{target.vocab_size}; they must be the same."
        )
    for eos_id in eos_ids:
        if not 0 <= eos_id < target.vocab_size:
            raise ValueError(f"EOS id {eos_id} lies outside the {target.vocab_size} tokens.")

    def init(
        rng_keys: Array, sampling: Sampling, first_tokens: Array, limit: Array, max_length: int
    ) -> DecodeState:
        b = first_tokens.shape[0]
        tokens = jnp.zeros((b, max_length), jnp.int32).at[:, 0].set(first_tokens)
        context = Context(
            tokens=tokens,
            length=jnp.ones([b], jnp.int32),
            limit=jnp.asarray(limit, jnp.int32),
            cache=target.init_cache(b, max_length),
            sampling=sampling,
        )
        return DecodeState(
            context=context,
            drafter=drafter.init(b, max_length),
            rng_keys=samplers.streams(rng_keys),
            done=context.length >= _end(context),
            num_steps=jnp.zeros([b], jnp.int32),
        )

    def score(params: Params, context: Context, draft: Draft) -> tuple[ModelOutput, Block]:
        mask = trees.ancestor_mask(draft.parents)
        positions = context.length[:, None] - 1 + trees.depths(mask)
        return target.apply(params.target, draft.tokens, positions, mask, context.cache)

    def absorb(
        params: Params, state: DecodeState, outcome: Outcome, block: Block, new_tokens: Array
    ) -> DecodeState:
        """Makes the verdict history: tokens, the target's cache, the drafter's beliefs."""
        old, verdict = state.context, outcome.verdict
        context = dataclasses.replace(
            old,
            tokens=caches.write(old.tokens, new_tokens, old.length, verdict.num_nodes),
            length=old.length + verdict.num_nodes,
            cache=caches.commit(old.cache, block, verdict.path, verdict.num_nodes),
        )
        observed = drafter.observe(params, state.drafter, context, outcome)
        return dataclasses.replace(state, context=context, drafter=observed)

    def force(params: Params, state: DecodeState, tokens: Array, num_tokens: Array) -> DecodeState:
        """Appends the first `num_tokens` [B] of `tokens` [B, T]: a step whose verdict is known.

        Cut at the end of the buffer only. A row that grows is no longer done, unless it is full.
        """
        old = state.context
        draft = trees.chain(jnp.concatenate([trees.root(old), tokens[:, :-1]], 1))
        output, block = score(params, old, draft)
        count = jnp.minimum(num_tokens, old.tokens.shape[1] - old.length)
        count = caches.tie(count, output.features)
        path = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        verdict = Verdict(path, count, _last(tokens, count))
        # What follows is garbage, from which nobody may learn: it belongs to no tree.
        given = path < num_tokens[:, None]
        draft = dataclasses.replace(draft, parents=jnp.where(given, draft.parents, -1))
        state = absorb(params, state, Outcome(draft, output, verdict), block, tokens)
        full = state.context.length >= _end(state.context)
        return dataclasses.replace(state, done=jnp.where(count > 0, full, state.done))

    def step(params: Params, state: DecodeState) -> tuple[DecodeState, StepInfo]:
        """One target pass for every row; finished rows stay exactly as they are."""
        old = state.context
        draft, proposed = drafter.propose(params, state.rng_keys, state.drafter, old)
        output, block = score(params, old, draft)
        warped = warp(output.logits, old.sampling)
        verdict = verifier.verify(params, state.rng_keys, old, draft, output, warped)

        following = jnp.pad(verdict.path[:, 1:], ((0, 0), (0, 1)))
        new_tokens = jnp.take_along_axis(draft.tokens, following, 1)
        place = jnp.arange(new_tokens.shape[1])
        is_bonus = place == verdict.num_nodes[:, None] - 1
        new_tokens = jnp.where(is_bonus, verdict.next_token[:, None], new_tokens)
        is_eos = jnp.zeros(new_tokens.shape, bool)
        for eos_id in eos_ids:
            is_eos |= new_tokens == eos_id
        until_eos = 1 + jnp.where(is_eos, place, new_tokens.shape[1]).min(1)
        room = jnp.maximum(_end(old) - old.length, 0)
        count = jnp.minimum(jnp.minimum(verdict.num_nodes, until_eos), room)
        count = jnp.where(state.done, 0, count).astype(jnp.int32)
        verdict = Verdict(verdict.path, count, _last(new_tokens, count))

        state = dataclasses.replace(
            state, drafter=proposed, num_steps=state.num_steps + ~state.done
        )
        outcome = Outcome(draft, output, verdict)
        state = absorb(params, state, outcome, block, new_tokens)
        ended = (until_eos <= count) | (state.context.length >= _end(state.context))
        info = StepInfo(
            tokens=new_tokens,
            num_tokens=count,
            num_drafted=jnp.where(state.done, 0, draft.num_drafted),
            logits=jnp.take_along_axis(output.logits, verdict.path[..., None], 1),
            warped_logits=jnp.take_along_axis(warped, verdict.path[..., None], 1),
        )
        return dataclasses.replace(state, done=state.done | ended), info

    return Decoder(
        init,
        force,
        step,
        drafter.proposal,
        verifier.lossless,
        target.vocab_size,
        verifier.drafter_invariant,
    )


def _end(context: Context) -> Array:
    """The length [B] at which each row ends: its limit or the buffer."""
    return jnp.minimum(context.limit, context.tokens.shape[1])


def _last(tokens: Array, count: Array) -> Array:
    """The count-th of each row's tokens, [B]; any where the count is 0."""
    return jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], 1)[:, 0]


# ---------------------------------------------------------------------------------- the loop


@functools.partial(jax.jit, static_argnames=("decoder", "max_length"))
def prefill(
    decoder: Decoder,
    params: Params,
    rng_keys: Array,
    sampling: Sampling,
    prompt: Array,
    prompt_length: Array,
    limit: Array,
    max_length: int,
) -> DecodeState:
    """Absorbs prompts in chunks of one static width.

    Args:
        decoder: from `decoder`.
        params: its weights.
        rng_keys: [B] keys; a row's output depends on its own key only.
        sampling: from `sampling.sampling`.
        prompt: [B, T] int32, garbage from `prompt_length` on.
        prompt_length: [B] int32, 1 to T.
        limit: [B] int32, the length, prompt included, at which each row ends.
        max_length: S, the length of all buffers; at least T.
    """
    if not 1 <= prompt.shape[1] <= max_length:
        raise ValueError(
            f"Prompts of width {prompt.shape[1]} need between 1 token and the buffer's "
            f"{max_length}; raise max_length or shorten them."
        )
    rest = prompt.shape[1] - 1
    width = max(1, min(PROMPT_CHUNK, rest))
    tokens = jnp.pad(prompt[:, 1:], ((0, 0), (0, -rest % width if rest else width)))
    state = decoder.init(rng_keys, sampling, prompt[:, 0], limit, max_length)

    def absorb(i: Array, state: DecodeState) -> DecodeState:
        chunk = lax.dynamic_slice_in_dim(tokens, i * width, width, 1)
        return decoder.force(
            params, state, chunk, jnp.clip(prompt_length - 1 - i * width, 0, width)
        )

    num_chunks = jnp.maximum((prompt_length.max() - 2) // width + 1, 1)
    return lax.fori_loop(0, num_chunks, absorb, state)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def advance(
    decoder: Decoder, params: Params, state: DecodeState, num_steps: int | Array
) -> DecodeState:
    """Steps until every row is done, at most `num_steps` times. Consumes the state."""
    return steps(decoder, params, state, num_steps, (), lambda memory, old, info: memory)[0]


def steps(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    num_steps: int | Array,
    memory: PyTree,
    remember: Callable,
) -> tuple[DecodeState, PyTree]:
    """The loop of `advance`, not compiled, with a memory of what its steps did.

    Args:
        memory: anything.
        remember: (memory, the state before a step, its StepInfo) -> memory.
    """

    def unfinished(carry: tuple[Array, DecodeState, PyTree]) -> Array:
        i, state, _ = carry
        return (i < num_steps) & ~state.done.all()

    def step(carry: tuple[Array, DecodeState, PyTree]) -> tuple[Array, DecodeState, PyTree]:
        i, old, memory = carry
        state, info = decoder.step(params, old)
        return i + 1, state, remember(memory, old, info)

    return lax.while_loop(unfinished, step, (jnp.int32(0), state, memory))[1:]


@functools.partial(jax.jit, static_argnames=("decoder", "max_length"))
def decode(
    decoder: Decoder,
    params: Params,
    rng_keys: Array,
    sampling: Sampling,
    prompt: Array,
    prompt_length: Array,
    limit: Array,
    max_length: int,
) -> DecodeState:
    """Decodes prompts to their ends in one compiled program; arguments as for `prefill`.

    Returns:
        The final state: row b's text is `context.tokens[b, :context.length[b]]`.
    """
    state = prefill(decoder, params, rng_keys, sampling, prompt, prompt_length, limit, max_length)
    return advance(decoder, params, state, max_length)


def bucket(length: int, smallest: int = 64) -> int:
    """The next power of two, at least `smallest`: pad to it and few shapes are ever compiled."""
    return max(smallest, 1 << (length - 1).bit_length())
