"""Drafts with the target's weights over a few slots of its cache.

Over long texts reading the cache takes the time of a pass, and most of it hardly matters (TriForce,
arXiv 2404.11912; MagicDec, arXiv 2408.11049). A *view* says which slots a draft reads: the first
and the latest (`streaming`), or those that the latest tokens attended to most (`snapkv`). Rows with
a short history see all of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp
from jax import lax

from specjax import cache as caches
from specjax.drafters.grow import Builder
from specjax.drafters.self_speculation import grow_from_root
from specjax.models import streaming as models
from specjax.types import Array, Cache, Context, Draft, Drafter, Keys, Model, Outcome, Params


class View(NamedTuple):
    """Reads part of the target's cache."""

    num_slots: int  # per layer, key/value head and row
    init: Callable  # (batch_size, max_length) -> state
    observe: Callable  # (params: Params, state, context, outcome) -> state
    read: Callable  # (state, cache) -> what `apply` is given of it
    apply: Callable  # a `Model.apply`


def sparse(target: Model, view: Callable[[Model], View], build: Builder) -> Drafter:
    """Drafts with the target's own weights, `params.target`, and has no others.

    Args:
        target: the decoder's.
        view: `streaming(...)` or `snapkv(...)`.
        build: the tree.

    Raises:
        ValueError: a target whose attention the view cannot know; when decoding starts, a buffer
            with fewer slots than the view has.
    """
    seen = view(target)

    def init(batch_size: int, max_length: int) -> Any:
        if seen.num_slots > max_length:
            raise ValueError(
                f"A draft's view has {seen.num_slots} slots but the buffer only {max_length}; "
                "choose a smaller view or draft with all of them."
            )
        return seen.init(batch_size, max_length)

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        cache = seen.read(state, context.cache)
        draft = grow_from_root(seen.apply, params.target, cache, build, rng_keys, context)
        return draft, state

    return Drafter(init, propose, seen.observe, build.proposal, target.vocab_size)


def streaming(num_sinks: int, window: int) -> Callable[[Model], View]:
    """The first tokens and the latest: StreamingLLM, arXiv 2309.17453; see `models.streaming`.

    Args:
        num_sinks: how many of the first tokens are seen.
        window: how many before each token.

    Raises:
        ValueError: fewer than no sinks or than one token before each.
    """
    models.check(num_sinks, window)

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    def view(target: Model) -> View:
        apply = models.streaming(target, num_sinks, window).apply
        return View(num_sinks + window, init, observe, lambda state, cache: cache, apply)

    return view


@struct.dataclass
class SnapKVState:
    """The slots chosen when `num_cached` tokens were in the cache.

    `num_cached` is the largest multiple of `refresh` in the cache's length, so that the choice does
    not depend on how the text was cut into steps. Holds from the first `observe` on.
    """

    slots: Array  # [B, L, K, C] int32, ascending
    num_cached: Array  # [B] int32


def snapkv(budget: int, window: int, refresh: int, pool: int = 7) -> Callable[[Model], View]:
    """What the latest tokens attended to most: SnapKV, arXiv 2404.14469.

    Whenever the cache has grown by `refresh` tokens, the last `window` of them are fed once more,
    and the attention that their queries lay on each slot before them is summed. Each layer and
    key/value head keeps the `budget` slots of the largest sum, neighbours included. The latest
    `window` slots are always seen too; what leaves them waits for the next choice.

    Args:
        budget: C, slots chosen.
        window: of the latest tokens, whose queries choose.
        refresh: tokens after which slots are chosen anew.
        pool: a slot counts as the best of so many around it, an odd number.

    Raises:
        ValueError: a number below 1, an even pool; when applied, a model that does not tell its
            attention.
    """
    if min(budget, window, refresh, pool) < 1 or pool % 2 == 0:
        raise ValueError(
            f"snapkv(budget={budget}, window={window}, refresh={refresh}, pool={pool}) needs at "
            "least 1 of each, and an odd pool."
        )

    def view(target: Model) -> View:
        stack = target.stack
        if stack is None or stack.attention is None:
            raise ValueError(
                f"snapkv chooses {budget} slots by attention but this target does not tell its "
                "own; pass a whole transformer without windows, or view it by streaming()."
            )
        attention = stack.attention

        def init(batch_size: int, max_length: int) -> SnapKVState:
            keys = jax.eval_shape(lambda: target.init_cache(batch_size, max_length)).keys
            first = jnp.arange(budget, dtype=jnp.int32)
            slots = jnp.broadcast_to(first, (batch_size, len(keys), keys[0].shape[1], budget))
            return SnapKVState(slots, jnp.zeros([batch_size], jnp.int32))

        def choose(params: Params, context: Context, num_cached: Array) -> Array:
            start = jnp.maximum(num_cached - window, 0)
            place = jnp.arange(window, dtype=jnp.int32)
            positions = start[:, None] + place
            slots = jnp.minimum(positions, context.tokens.shape[1] - 1)
            tokens = jnp.take_along_axis(context.tokens, slots, 1)
            causal = jnp.broadcast_to(place <= place[:, None], (*tokens.shape, window))
            before = caches.truncate(context.cache, start)
            weight = attention(params.target, tokens, positions, causal, before)
            return most_attended(jnp.stack(weight, 1), start, budget, pool)

        def observe(
            params: Params, state: SnapKVState, context: Context, outcome: Outcome
        ) -> SnapKVState:
            gained = outcome.verdict.num_nodes
            cached = context.cache.length
            num_cached = jnp.where(gained > 0, cached // refresh * refresh, state.num_cached)
            # What lies beyond the old length may have been another text when slots were chosen.
            is_new = num_cached > cached - gained
            is_stale = (gained > 0) & (is_new | (num_cached != state.num_cached))
            slots = lax.cond(
                is_stale.any(), lambda: choose(params, context, num_cached), lambda: state.slots
            )
            slots = jnp.where(is_stale[:, None, None, None], slots, state.slots)
            return SnapKVState(slots, num_cached)

        def read(state: SnapKVState, cache: Cache) -> Cache:
            # Below the latest slots there are `budget` others, or in short histories just those.
            start = jnp.maximum(cache.length - window, budget)[:, None, None, None]
            latest = start + jnp.arange(window, dtype=jnp.int32)
            latest = jnp.broadcast_to(latest, (*state.slots.shape[:3], window))
            slots = jnp.concatenate([state.slots, latest], 3)[..., None]  # [B, L, K, C + W, 1]

            def some(of_layers: tuple[Array, ...]) -> tuple[Array, ...]:
                return tuple(
                    jnp.take_along_axis(x, slots[:, i], 2, mode="promise_in_bounds")
                    for i, x in enumerate(of_layers)
                )

            length = jnp.minimum(cache.length, budget + window)
            return Cache(some(cache.keys), some(cache.values), length)

        return View(budget + window, init, observe, read, target.apply)

    return view


def most_attended(weight: Array, length: Array, budget: int, pool: int) -> Array:
    """The slots of the largest attention, each counting as the best of `pool` around it.

    Args:
        weight: [B, L, K, S].
        length: [B] int32; slots from here on are out of the question, unless others run out.
        budget: C.
        pool: odd.

    Returns:
        [B, L, K, C] int32, ascending; ties go to the first.
    """
    shape, ones = (1, 1, 1, pool), (1, 1, 1, 1)
    weight = lax.reduce_window(weight, -jnp.inf, lax.max, shape, ones, "SAME")
    is_before = jnp.arange(weight.shape[3], dtype=jnp.int32) < length[:, None]
    weight = jnp.where(is_before[:, None, None], weight, -1.0)
    return jnp.sort(lax.top_k(weight, budget)[1], -1).astype(jnp.int32)
