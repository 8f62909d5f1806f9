"""N-gram tables: what usually followed the last few tokens of this text.

ANPD, Ou et al., arXiv 2404.08698. There is a table for every n from 2 to `order`, from contexts of
n - 1 tokens to the token that followed. The prompt fills them, every token that is committed goes
on doing so, and a draft is made token by token of the longest context that is known. The tri-gram
statistics of ADED, Liu et al., arXiv 2407.12021, are `order=3`; its tree search is not made here.
"""

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax import trees
from specjax.types import Array, Context, Draft, Drafter, Keys, Outcome, Params, Proposal

FINGERPRINT, TOKEN, COUNT = range(3)  # columns of a table


@struct.dataclass
class NgramState:
    """What followed which context; a function of the text alone, however it was committed.

    The slots of order n begin at (n - 2) H. A slot holds one pair of a context and the token that
    followed, and how often it was seen more than others that fell there: seen again, its count goes
    up; another pair, of the same context or not, takes it down by one, and takes the slot when that
    leaves nothing. So a token that follows its context more often than not stays, of tokens that
    take turns the latest does, and what is no longer seen gives way.
    """

    table: Array  # [B, (order - 1) H, 3] int32: the context's fingerprint, the token, the count


def fingerprints(tokens: Array, order: int) -> Array:
    """A hash of the newest 1 to `order` - 1 tokens.

    Args:
        tokens: [..., order - 1] int32, the newest first.

    Returns:
        [..., order - 1] uint32. Contexts are told apart by nothing else: of two different ones
        about one pair in 2 ** 32 is equal.
    """
    mixed, found = jnp.zeros(tokens.shape[:-1], jnp.uint32), []
    for back in range(order - 1):
        mixed = (mixed + tokens[..., back].astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
        mixed ^= mixed >> 15
        found.append(mixed)
    return jnp.stack(found, -1)


def ngram(num_tokens: int, order: int = 5, num_slots: int = 4096) -> Drafter:
    """Drafts `num_tokens` tokens one after another, fillers from where no context is known.

    Args:
        num_tokens: D.
        order: the largest n.
        num_slots: H, of each table; contexts are spread over them by their fingerprints.

    Raises:
        ValueError: no token, no order with a context, no slot.
    """
    if num_tokens < 1 or order < 2 or num_slots < 1:
        raise ValueError(
            f"ngram(num_tokens={num_tokens}, order={order}, num_slots={num_slots}) has nothing to "
            "draft or no table to draft from; they must be at least 1, 2 and 1."
        )
    sizes = np.arange(1, order)  # tokens of a context, table by table

    def slots(fingerprint: Array) -> Array:
        """Where in the table each context [..., order - 1] belongs."""
        return (fingerprint % num_slots).astype(jnp.int32) + (sizes - 1) * num_slots

    def init(batch_size: int, max_length: int) -> NgramState:
        del max_length
        return NgramState(jnp.zeros((batch_size, (order - 1) * num_slots, 3), jnp.int32))

    def propose(
        params: Params, rng_keys: Keys, state: NgramState, context: Context
    ) -> tuple[Draft, NgramState]:
        del params, rng_keys
        last = jnp.maximum(context.length[:, None] - sizes, 0)
        newest = jnp.take_along_axis(context.tokens, last, 1)  # [B, order - 1], the newest first
        root = newest[:, :1]
        tokens, is_known = [root], jnp.ones(len(root), bool)
        num_drafted = jnp.zeros(len(root), jnp.int32)
        for depth in range(num_tokens):
            fingerprint = fingerprints(newest, order)
            found = jnp.take_along_axis(state.table, slots(fingerprint)[..., None], 1)
            knows = (found[..., FINGERPRINT] == fingerprint.astype(jnp.int32)) & (
                found[..., COUNT] > 0
            )
            knows &= sizes <= context.length[:, None] + depth
            longest = jnp.where(knows, sizes, 0).max(1, keepdims=True)
            guess = jnp.where(sizes == longest, found[..., TOKEN], 0).sum(1, keepdims=True)
            is_known &= longest[:, 0] > 0
            num_drafted += is_known
            tokens.append(jnp.where(is_known[:, None], guess, root))
            newest = jnp.concatenate([tokens[-1], newest[:, :-1]], 1)
        return trees.chain(jnp.concatenate(tokens, 1), num_drafted=num_drafted), state

    def observe(
        params: Params, state: NgramState, context: Context, outcome: Outcome
    ) -> NgramState:
        del params
        count = outcome.verdict.num_nodes
        place = jnp.arange(outcome.verdict.path.shape[1])
        position = (context.length - count)[:, None] + place  # [B, P], of the news
        behind = jnp.maximum(position[..., None] - np.arange(order), 0)  # [B, P, order]
        b, s = context.tokens.shape
        behind = jnp.minimum(behind, s - 1).reshape(b, -1)
        tokens = jnp.take_along_axis(context.tokens, behind, 1).reshape(b, -1, order)
        fingerprint = fingerprints(tokens[..., 1:], order)
        is_there = (place < count[:, None])[..., None] & (sizes <= position[..., None])
        # A row of the loop's: slot, fingerprint and token, [B, P, order - 1, 3].
        out = (order - 1) * num_slots + sizes - 1  # beyond the table, each elsewhere
        where = jnp.where(is_there, slots(fingerprint), out)
        token = jnp.broadcast_to(tokens[..., :1], where.shape)
        pairs = jnp.stack([where, fingerprint.astype(jnp.int32), token], -1)

        def learn(i: Array, table: Array) -> Array:
            where, fingerprint, token = jnp.moveaxis(
                lax.dynamic_index_in_dim(pairs, i, 1, keepdims=False), -1, 0
            )
            old = jnp.take_along_axis(table, where[..., None], 1, mode="clip")
            is_same = (old[..., FINGERPRINT] == fingerprint) & (old[..., TOKEN] == token)
            left = old[..., COUNT] + jnp.where(is_same, 1, -1)
            new = jnp.stack([fingerprint, token, jnp.ones_like(left)], -1)
            new = jnp.where((left > 0)[..., None], old.at[..., COUNT].set(left), new)
            return jax.vmap(lambda t, i, x: t.at[i].set(x, mode="drop", unique_indices=True))(
                table, where, new
            )

        return NgramState(lax.fori_loop(0, count.max(), learn, state.table))

    return Drafter(init, propose, observe, Proposal("point", num_tokens + 1, num_tokens))
