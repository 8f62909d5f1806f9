"""JAX's own Threefry-2x32 generator (Salmon et al., SC 2011), bit for bit, without a loop.

On CPU, JAX runs the twenty rounds as a loop of small operations, which for one row of noise takes
longer than a layer of a small model. Written out they become one operation; and Gumbel noise has a
kernel of its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.random import define_prng_impl

from specjax.kernels import native
from specjax.types import Array

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(key: Array, high: Array, low: Array) -> tuple[Array, Array]:
    """Encrypts pairs of words.

    Args:
        key: [2] uint32.
        high, low: [...] uint32, the two words of each counter.
    """
    words = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    high, low = high + words[0], low + words[1]
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            high = high + low
            low = (low << jnp.uint32(r)) | (low >> jnp.uint32(32 - r))
            low = low ^ high
        high = high + words[(group + 1) % 3]
        low = low + words[(group + 2) % 3] + jnp.uint32(group + 1)
    return high, low


def _counters(shape: tuple[int, ...]) -> tuple[Array, Array]:
    if math.prod(shape) >= 1 << 32:
        raise ValueError(f"{shape} are more than 2**32 random words; draw fewer at once.")
    low = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return jnp.zeros_like(low), low


def _bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    if bit_width != 32:
        raise ValueError(f"{bit_width}-bit random words are not offered; take 32.")
    high, low = threefry_2x32(key, *_counters(shape))
    return high ^ low


def _fold_in(key: Array, data: Array | int) -> Array:
    word = jnp.asarray(data).astype(jnp.uint32)
    return jnp.stack(threefry_2x32(key, jnp.zeros_like(word), word))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.stack(threefry_2x32(key, *_counters(shape)), -1)


def _seed(seed: Array) -> Array:
    word = jnp.asarray(seed).astype(jnp.uint32)
    return jnp.stack([jnp.zeros_like(word), word])


_IMPLEMENTATION = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="specjax_threefry2x32",
    tag="sfry",
)


def straight(keys: Array) -> Array:
    """The same keys, drawing the same numbers by the code above.

    Keys of another generator are hashed into one of these.
    """
    data = jax.random.key_data(keys)
    if data.shape[keys.ndim :] != (2,):
        flat = jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys.reshape(-1))
        data = flat.reshape(*keys.shape, 2)
    return jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)


def gumbel(keys: Array, shape: tuple[int, ...]) -> Array:
    """What `jax.random.gumbel(key, shape)` draws for each of the keys [B], [B, *shape] float32."""
    size = math.prod(shape)
    if not native.available():
        noise = _plain_gumbel(size, jax.random.key_data(keys))
    else:
        noise = lax.platform_dependent(
            jax.random.key_data(keys),
            cpu=functools.partial(_gumbel_kernel, size),
            default=functools.partial(_plain_gumbel, size),
        )
    return noise.reshape(*keys.shape, *shape)


def _plain_gumbel(size: int, data: Array) -> Array:
    keys = jax.random.wrap_key_data(data, impl=_IMPLEMENTATION)
    return jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)


def _gumbel_kernel(size: int, data: Array) -> Array:
    result = jax.ShapeDtypeStruct((data.shape[0], size), jnp.float32)
    return jax.ffi.ffi_call(native.GUMBEL, result, vmap_method="sequential")(data)
