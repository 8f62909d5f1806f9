"""A model that attends to the first tokens of a text and the latest only.

StreamingLLM (Xiao et al., arXiv 2309.17453), the middle model of TriForce and a draft of MagicDec
(arXiv 2404.11912, 2408.11049). Positions stay those of the text: a draft's text is no longer than
the model's context, so that none is unknown to it. A token sees the `num_sinks` first tokens, the
`window` tokens before it and itself, whether they lie in the cache or in the block.
"""

import jax.numpy as jnp

from specjax.types import Array, Block, Cache, Model, ModelOutput, PyTree


def streaming(model: Model, num_sinks: int, window: int) -> Model:
    """The same model with the same params and caches, of which few slots are read.

    Args:
        model: any.
        num_sinks: how many of the first tokens are seen.
        window: how many of the latest.

    Raises:
        ValueError: fewer than no sinks or than one token before each.
    """
    check(num_sinks, window)

    def apply(
        params: PyTree,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache,
        block: Block | None = None,
    ) -> tuple[ModelOutput, Block]:
        sinks, latest, is_there = _read(cache, num_sinks, window)
        # Each new token sees others of the latest slots, which masks can say of a block only.
        longer = latest if block is None else _joined(latest, block)
        in_front = latest.positions.shape[1]
        seen = jnp.broadcast_to(is_there[:, None], (*positions.shape, in_front))
        seen = jnp.concatenate([seen, mask], 2)
        at = jnp.concatenate([longer.positions, positions], 1)[:, None]
        seen &= (at < num_sinks) | (at >= positions[:, :, None] - window)
        output, longer = model.apply(params, tokens, positions, seen, sinks, longer)
        return output, _behind(longer, in_front)

    return model._replace(apply=apply, stack=None)


def check(num_sinks: int, window: int) -> None:
    """Refuses, by a `ValueError`, what would hide a token's predecessor from it."""
    if num_sinks < 0 or window < 1:
        raise ValueError(
            f"streaming(num_sinks={num_sinks}, window={window}) sees too little; need at least 0 "
            "and 1."
        )


def _read(cache: Cache, num_sinks: int, window: int) -> tuple[Cache, Block, Array]:
    """The sinks, the latest slots and which of these are history [B, W]."""
    num_slots = cache.keys[0].shape[2]
    num_sinks = min(num_sinks, num_slots)
    window = min(window, num_slots - num_sinks)
    start = jnp.maximum(cache.length - window, num_sinks)
    slot = start[:, None] + jnp.arange(window, dtype=jnp.int32)

    def latest(x: Array) -> Array:
        return jnp.take_along_axis(x, slot[:, None, :, None], 2, mode="promise_in_bounds")

    def first(x: Array) -> Array:
        return x[:, :, :num_sinks]

    length = jnp.minimum(cache.length, num_sinks)
    sinks = Cache(tuple(map(first, cache.keys)), tuple(map(first, cache.values)), length)
    block = Block(tuple(map(latest, cache.keys)), tuple(map(latest, cache.values)), slot)
    return sinks, block, slot < cache.length[:, None]


def _joined(one: Block, other: Block) -> Block:
    def both(xs: tuple[Array, ...], ys: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.concatenate([x, y], 2) for x, y in zip(xs, ys, strict=True))

    positions = jnp.concatenate([one.positions, other.positions], 1)
    return Block(both(one.keys, other.keys), both(one.values, other.values), positions)


def _behind(block: Block, count: int) -> Block:
    """The block without its first `count` tokens."""
    keys, values = (tuple(x[:, :, count:] for x in xs) for xs in (block.keys, block.values))
    return Block(keys, values, block.positions[:, count:])
