"""How laws are warped and tokens drawn: temperature and truncation per row, and all randomness.

Every draw is named by its stream and site. The *shared* stream is read through the position of the
token being emitted, so that whoever draws a token for a position sees the same noise. The *private*
stream is read through the position of the root, which no two steps of a row have in common.
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

from specjax.kernels import noise
from specjax.kernels.vocabulary import argmax
from specjax.types import Array, Context, Draws, Keys, Sampling

_SHARED, _PRIVATE = 0, 1


# ------------------------------------------------------------------------ what a row asks for


def sampling(
    batch_size: int,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
) -> Sampling:
    """Sampling parameters of a batch; every one a scalar or [B].

    Args:
        batch_size: B.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 is off.
        top_p: keep the likeliest tokens that hold this much mass; 1 is off.
        min_p: keep tokens at least this likely, relative to the likeliest; 0 is off.

    Raises:
        ValueError: a value out of range or of another length than the batch.
    """
    return Sampling(*map(jnp.asarray, checked(batch_size, temperature, top_k, top_p, min_p)))


def checked(
    batch_size: int,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
) -> tuple[np.ndarray, ...]:
    """The same as arrays [B] of numpy's, for whoever has to know before anything is compiled."""

    def rows(name: str, value: ArrayLike, low: float, high: float, dtype: type) -> np.ndarray:
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r:.60}; it must be a number.") from error
        if array.shape not in ((), (batch_size,)):
            raise ValueError(
                f"{name} has shape {array.shape} for {batch_size} row(s); need one number, or one "
                "each."
            )
        wrong = array[~((array >= low) & (array <= high))]
        if wrong.size:
            bound = f"at least {low:g}" if high == np.inf else f"from {low:g} to {high:g}"
            raise ValueError(f"{name} is {wrong[0]:g}; it must be {bound}.")
        return np.broadcast_to(array.astype(dtype), [batch_size])

    return (
        rows("temperature", temperature, 0, np.inf, np.float32),
        rows("top_k", top_k, 0, np.inf, np.int32),
        rows("top_p", top_p, 0, 1, np.float32),
        rows("min_p", min_p, 0, 1, np.float32),
    )


def warp(logits: Array, sampling: Sampling) -> Array:
    """Logits [B, N, V] -> log-weights [B, N, V] of the law each row samples from.

    Temperature, then top-k, top-p and min-p; what is cut is -inf. At temperature 0 the likeliest
    token has all the weight, ties going to the lowest id.
    """
    greedy = sampling.temperature == 0

    def both(x: Array) -> Array:
        return jnp.where(greedy[:, None, None], _one_hot(x), _sampled(x, sampling))

    # Each sweep over a vocabulary costs: a batch of one kind takes only its own.
    kind = jnp.where(greedy.all(), 0, jnp.where(greedy.any(), 2, 1))
    return lax.switch(kind, (_one_hot, lambda x: _sampled(x, sampling), both), logits)


def _one_hot(logits: Array) -> Array:
    ids = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids == argmax(logits)[..., None], 0.0, -jnp.inf)


def _sampled(logits: Array, sampling: Sampling) -> Array:
    greedy = sampling.temperature == 0
    scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None, None]
    cuts = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    return lax.cond((cuts & ~greedy).any(), _truncate, lambda x, _: x, scaled, sampling)


def _truncate(x: Array, sampling: Sampling) -> Array:
    """Cuts to top-k, top-p and min-p by threshold search: sorting a vocabulary is far slower."""
    order = _ordered_bits(x)
    top_k = jnp.where(sampling.top_k > 0, sampling.top_k, x.shape[-1])[:, None, None]
    top_k = jnp.minimum(top_k, x.shape[-1]).astype(x.dtype)
    above = order >= _threshold(order, jnp.ones_like(x), top_k)
    x = jnp.where(above, x, -jnp.inf)
    mass = jnp.exp(x - x.max(-1, keepdims=True))
    top_p = sampling.top_p[:, None, None]
    nucleus = order >= _threshold(order, mass, top_p * mass.sum(-1, keepdims=True))
    x = jnp.where(nucleus | (top_p >= 1), x, -jnp.inf)
    floor = x.max(-1, keepdims=True) + jnp.log(sampling.min_p)[:, None, None]
    return jnp.where(x >= floor, x, -jnp.inf)


def _ordered_bits(x: Array) -> Array:
    """Integers that compare as the floats do."""
    width = jnp.finfo(x.dtype).bits
    integer = jnp.dtype(f"int{width}")
    bits = lax.bitcast_convert_type(x, integer)
    return bits ^ ((bits >> (width - 1)) & jnp.iinfo(integer).max)


def _threshold(order: Array, weight: Array, enough: Array) -> Array:
    """The largest threshold [..., 1] at or above which entries weigh `enough` [..., 1] in all."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # `low` holds enough, `high` does not
        middle = (low & high) + ((low ^ high) >> 1)
        holds = jnp.where(order >= middle, weight, 0).sum(-1, keepdims=True) >= enough
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = order.min(-1, keepdims=True)
    return lax.fori_loop(
        0, jnp.iinfo(order.dtype).bits, halve, (low, order.max(-1, keepdims=True) + 1)
    )[0]


# -------------------------------------------------------------------------------- randomness


def _bernoulli(site: str, keys: Array, probs: Array) -> Array:
    del site
    return jax.vmap(jax.random.uniform, (0, None))(keys, probs.shape[1:]) < probs


def _noise(site: str, keys: Array, shape: tuple[int, ...]) -> Array:
    """Gumbel noise: the largest of log-weights plus noise is a draw from them."""
    del site
    return noise.gumbel(keys.reshape(-1), shape).reshape(*keys.shape, *shape)


def _pick(noise: Array, log_weights: Array, turn: int) -> Array:
    del turn
    return argmax(log_weights, noise)


RANDOM = Draws(_bernoulli, _noise, _pick)


def streams(rng_keys: Array, draws: Draws = RANDOM) -> Keys:
    """The two streams of each row from its key, [B]."""
    keys = noise.straight(rng_keys)

    def stream(i: int) -> Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)

    return Keys(stream(_SHARED), stream(_PRIVATE), draws)


def bernoulli(
    rng_keys: Keys, context: Context, site: str, probs: Array, index: int | Array = 0
) -> Array:
    """True with probability `probs` [B, ...], independently."""
    keys = private_keys(rng_keys, context, site, index)
    return rng_keys.draws.bernoulli(site, keys, probs)


def categorical(
    rng_keys: Keys, context: Context, site: str, log_weights: Array, index: int | Array = 0
) -> Array:
    """Tokens [B, ...] from unnormalised log-weights [B, ..., V], independently."""
    noise = private_noise(rng_keys, context, site, log_weights.shape[1:], index)
    return pick(rng_keys, noise, log_weights)


def private_noise(
    rng_keys: Keys, context: Context, site: str, shape: tuple[int, ...], index: int | Array = 0
) -> Array:
    """Noise for `pick`, independent for each law that `shape` = (..., V) holds: [B, ..., opaque].

    Zeros where every row is greedy, which no pick from a warped law can tell.
    """

    def draw() -> Array:
        keys = private_keys(rng_keys, context, site, index)
        return rng_keys.draws.noise(site, keys, shape)

    return _unless_greedy(context, draw)


def shared_noise(rng_keys: Keys, context: Context, positions: Array, vocab_size: int) -> Array:
    """Noise [B, ..., opaque] for whoever picks the tokens at `positions` [B, ...]; as above."""

    def draw() -> Array:
        keys = _shared_keys(rng_keys, positions)
        return rng_keys.draws.noise("shared", keys, (vocab_size,))

    return _unless_greedy(context, draw)


def pick(rng_keys: Keys, noise: Array, log_weights: Array, turn: int = 0) -> Array:
    """Tokens [...] drawn from unnormalised log-weights [..., V] by their noise [..., opaque].

    Several turns with one noise draw without replacement: the law of each turn has to be that of
    the turn before without the token picked (the top k of log-weights plus Gumbel noise, Kool et
    al., arXiv 1903.06059). Laws that share noise otherwise are coupled.
    """
    return rng_keys.draws.pick(noise, log_weights, turn)


def shared_gumbel(rng_keys: Keys, positions: Array, vocab_size: int) -> Array:
    """The Gumbel noise [B, ..., V] behind `shared_noise`."""
    return _noise("shared", _shared_keys(rng_keys, positions), (vocab_size,))


def _unless_greedy(context: Context, draw: Callable[[], Array]) -> Array:
    shape = jax.eval_shape(draw)
    sampled = (context.sampling.temperature > 0).any()
    return lax.cond(sampled, draw, lambda: jnp.zeros(shape.shape, shape.dtype))


def _shared_keys(rng_keys: Keys, positions: Array) -> Array:
    """One key per position [B, ...]."""

    def at(key: Array, row: Array) -> Array:
        return jax.vmap(lambda position: jax.random.fold_in(key, position))(row)

    flat = positions.reshape(positions.shape[0], -1)
    return jax.vmap(at)(rng_keys.shared, flat).reshape(positions.shape)


def private_keys(rng_keys: Keys, context: Context, site: str, index: int | Array = 0) -> Array:
    """One key per row [B], for the draws of this step at a named site."""
    name = zlib.crc32(site.encode()) & 0x7FFFFFFF

    def key(key: Array, root: Array) -> Array:
        for part in (name, root, index):
            key = jax.random.fold_in(key, part)
        return key

    return jax.vmap(key)(rng_keys.private, context.length - 1)
