"""Mistakes to plant: ways of choosing children, growing trees and judging that are not lossless."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from specjax.drafters import grow
from specjax.kernels.vocabulary import softmax
from specjax.sampling import categorical, sampling
from specjax.types import Array, Context, Draft, Keys, Verdict, Verifier
from specjax.verifiers.block import block
from specjax.verifiers.rejection import rejection

# ---------------------------------------------------------------------------------------- children


def instead(choose: grow.Choose, draw: Callable) -> grow.Choose:
    """`choose` with `draw(its draw, ...)` in place of its own."""
    return grow.Choose(functools.partial(draw, choose.draw), choose.law)


def misreported(draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int) -> Any:
    """Draws at twice the temperature that it reports."""
    return draw(keys, context, depth, x / 2, k)[0], draw(keys, context, depth, x, k)[1]


def temperature_one(
    draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int
) -> Any:
    """Draws at the row's temperature, and reports the law at temperature 1."""
    plain = context.replace(sampling=sampling(len(context.length), 1.0))
    return draw(keys, context, depth, x, k)[0], draw(keys, plain, depth, x, k)[1]


def argmax_reported_as_softmax(
    draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int
) -> Any:
    """Deterministic drafts verified as though they were sampled."""
    tokens, _ = grow.best().draw(keys, context, depth, x, k)
    return tokens, draw(keys, context, depth, x, k)[1]


def sorted_siblings(
    draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int
) -> Any:
    """Siblings in order of probability, each with the law that it was drawn from."""
    tokens, laws = draw(keys, context, depth, x, k)
    worth = jnp.take_along_axis(x[:, :, None], tokens[..., None], -1)[..., 0]
    order = jnp.argsort(-worth, -1)
    return jnp.take_along_axis(tokens, order, -1), jnp.take_along_axis(laws, order[..., None], 2)


def reused_noise(draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int) -> Any:
    """Private noise keyed by the node's position: the next step draws from it again."""
    at_node = context.replace(length=context.length + depth)
    return draw(keys, at_node, 0, x, k)


def shared_by_branches(
    draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int
) -> Any:
    """Every branch draws with the noise of the first."""
    drawn = [draw(keys, context, depth, x[:, i : i + 1], k) for i in range(x.shape[1])]
    return tuple(jnp.concatenate(part, 1) for part in zip(*drawn, strict=True))


def one_key_for_all(
    draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int
) -> Any:
    """Rows draw with the first row's key."""
    private = jnp.broadcast_to(keys.private[:1], keys.private.shape)
    return draw(keys.replace(private=private), context, depth, x, k)


def without_mass(draw: Callable, keys: Keys, context: Context, depth: int, x: Array, k: int) -> Any:
    """Reports a law under which the drafted token cannot be."""
    tokens, laws = draw(keys, context, depth, x, k)
    hot = jax.nn.one_hot(tokens, x.shape[-1], dtype=bool)
    return tokens, jnp.where(hot, -jnp.inf, laws)


# ------------------------------------------------------------------------------------------- trees


def rebuilt(build: grow.Builder, change: Callable[[Draft], Draft]) -> grow.Builder:
    def grown(*arguments: Any) -> Draft:
        return change(build.grow(*arguments))

    return grow.Builder(grown, build.proposal)


def left_at_q(build: grow.Builder) -> grow.Builder:
    """Merges siblings and leaves the law of the younger at q."""
    merged = grow.merged(build)

    def grown(*arguments: Any) -> Draft:
        plain, joined = build.grow(*arguments), merged.grow(*arguments)
        is_filler = joined.probs.max(-1) == 1.0
        return joined.replace(probs=jnp.where(is_filler[..., None], joined.probs, plain.probs))

    return grow.Builder(grown, merged.proposal)


def pruned(draft: Draft) -> Draft:
    """Drops a leaf whose own token was improbable: it becomes a filler beside its elder."""
    worth = jnp.take_along_axis(draft.probs, draft.tokens[..., None], 2)[..., 0]
    dropped = (worth < 0.4) & (jnp.arange(draft.tokens.shape[1]) == 2)
    tokens = jnp.where(dropped, draft.tokens[:, 1:2], draft.tokens)
    hot = jax.nn.one_hot(tokens, draft.probs.shape[-1])
    return draft.replace(tokens=tokens, probs=jnp.where(dropped[..., None], hot, draft.probs))


def unnormalised(draft: Draft) -> Draft:
    """Probabilities that sum to 1.25."""
    return draft.replace(probs=draft.probs * 1.25)


# ------------------------------------------------------------------------------------------- rules


def token_residual() -> Verifier:
    """Accepts as block verification does, but draws from what the token rule leaves."""

    def verify(*arguments: Any) -> Verdict:
        verdict = block().verify(*arguments)
        _, keys, context, draft, _, warped = arguments
        last, end = verdict.num_nodes[:, None, None] - 1, draft.depth
        p = softmax(jnp.take_along_axis(warped, last, 1)[:, 0])
        q = jnp.take_along_axis(draft.probs, jnp.minimum(last + 1, end), 1)[:, 0]
        left = jax.nn.relu(p - jnp.where(last[:, 0] == end, 0.0, q))
        left = jnp.where(left.sum(-1, keepdims=True) > 0, left, p)
        return verdict.replace(next_token=categorical(keys, context, "fault", jnp.log(left)))

    return Verifier(verify, ("chain",))


def without_residual() -> Verifier:
    """Speculative sampling that draws its last token from p, rejected or not."""

    def verify(*arguments: Any) -> Verdict:
        verdict = rejection().verify(*arguments)
        _, keys, context, _, _, warped = arguments
        p = jnp.take_along_axis(warped, verdict.num_nodes[:, None, None] - 1, 1)[:, 0]
        return verdict.replace(next_token=categorical(keys, context, "fault", p))

    return Verifier(verify, ("chain",))


def one_node_late() -> Verifier:
    """Looks the target's law up one node too late, as an off-by-one would."""

    def verify(*arguments: Any) -> Verdict:
        *others, warped = arguments
        return rejection().verify(*others, warped.at[:, 1:-1].set(warped[:, 2:]))

    return Verifier(verify, ("chain",))
