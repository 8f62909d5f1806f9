"""A model that is a table: the law of a token given the two before it, exact to the last bit.

Where laws are to be enumerated, a table says what they are, zeros included, in any precision, and
costs nothing. It goes through the same cache, mask and block as any model: what it caches are the
tokens themselves, so that a cache wrongly written is a wrong law.
"""

import jax
import jax.numpy as jnp
import numpy as np

from specjax import cache as caches
from specjax.types import Array, Block, Cache, Model, ModelOutput


def tabular(vocab_size: int, dtype: jnp.dtype = jnp.float32) -> Model:
    """A second-order Markov chain; params are log-weights [V, V, V] (last but one, last, next).

    Before the first token of a text comes token 0. Features are the logits.
    """

    def init(rng_key: Array) -> Array:
        return jax.random.normal(rng_key, (vocab_size,) * 3, dtype)

    def init_cache(batch_size: int, max_length: int) -> Cache:
        return caches.empty(1, (batch_size, 1, max_length, 1), dtype)

    def apply(
        params: Array,
        tokens: Array,
        positions: Array,
        mask: Array,
        cache: Cache,
        block: Block | None = None,
    ) -> tuple[ModelOutput, Block]:
        here = tokens.astype(cache.keys[0].dtype)[:, None, :, None]
        keys, at = here, positions
        if block is not None:
            keys = jnp.concatenate([block.keys[0], keys], 2)
            at = jnp.concatenate([block.positions, at], 1)
        # The token before each one is an ancestor in the block, or the newest of the cache.
        before = positions[:, :, None] - 1
        is_parent = mask & (at[:, None, :] == before)  # [B, N, M]
        slot = jnp.minimum(jnp.maximum(before, 0), max(cache.keys[0].shape[2] - 1, 0))
        if cache.keys[0].shape[2]:
            cached = jnp.take_along_axis(cache.keys[0][:, 0], slot, 1)[..., 0]
        else:
            cached = jnp.zeros_like(positions, keys.dtype)
        cached = jnp.where(before[..., 0] < cache.length[:, None], cached, 0)
        cached = jnp.where(before[..., 0] < 0, 0, cached)
        in_block = (is_parent * keys[:, :, :, 0]).sum(-1)
        previous = jnp.where(is_parent.any(-1), in_block, cached).astype(jnp.int32)
        logits = params[previous, tokens]
        # Values serve nothing, but the writers of caches expect them.
        block = Block((keys,), (keys,), at)
        return ModelOutput(logits, logits), block

    return Model(
        init,
        init_cache,
        apply,
        lambda params, tokens: jax.nn.one_hot(tokens, vocab_size, dtype=dtype),
        lambda params, hidden: hidden,
        vocab_size,
        hidden_size=vocab_size,
    )


def random_table(
    rng: np.random.Generator, vocab_size: int, spread: float = 0.7, zeros: float = 0.0
) -> np.ndarray:
    """Log-weights [V, V, V] of uneven laws (Dirichlet with parameter `spread`).

    `zeros` is the share of tokens that each law rules out; at least one stays.
    """
    laws = rng.dirichlet(np.full(vocab_size, spread), (vocab_size, vocab_size))
    ruled_out = rng.random(laws.shape) < zeros
    ruled_out &= laws < laws.max(-1, keepdims=True)
    laws = np.where(ruled_out, 0, laws)
    with np.errstate(divide="ignore"):
        return np.log(laws / laws.sum(-1, keepdims=True))
