"""Speculative Jacobi decoding: a Jacobi window of sampled tokens, each with the law it came from.

Teng et al., arXiv 2410.01699. The law of a window's position is the target's own, under the tokens
that the window held one sweep before. A verifier compares it with the target's law under those it
holds now, so that text is sampled losslessly, where Jacobi iterations are for greedy text only.

The whole window is drawn anew at every step, also where the paper keeps a token for another sweep:
a token that was there when others were accepted or refused is no longer a draw from its law given
all that happened, while a fresh one is whatever the past was. So q is exact, the law a chain's, and
`block` is legal. What redrawing costs are tails that never settle, as each position's new token
changes the laws behind it. Coupling the draws of successive sweeps keeps them and their marginals
(SCD, arXiv 2510.24211): with `grow.coupled()` a position is drawn with the same noise at all
times, and its token changes only as far as its law does.
"""

from typing import Any

import flax.struct as struct
import jax.numpy as jnp
from jax import lax

from specjax.drafters import grow
from specjax.drafters.jacobi import check_window, moved, swept
from specjax.kernels.gather import gather
from specjax.types import Array, Context, Draft, Drafter, Keys, Model, Outcome, Params


@struct.dataclass
class SpeculativeJacobiState:
    """A window that follows the root, in order.

    Positions from `num_known` on have the law that the root was predicted with, uniform before the
    first `observe`. Tokens are -1 at positions for which none was drawn yet.
    """

    tokens: Array  # [B, n] int32, drawn last
    logits: Array  # [B, n, V] float32, the target's in its last sweep over each position
    num_known: Array  # [B] int32


def speculative_jacobi(target: Model, num_tokens: int, choose: grow.Choose) -> Drafter:
    """Drafts a window of `num_tokens` tokens as a chain.

    Args:
        target: the decoder's.
        num_tokens: n.
        choose: how a token is drawn: `grow.without_replacement()` for SJD, `grow.coupled()` for
            SCD, `grow.best()` for point masses.

    Raises:
        ValueError: fewer than one token; in `init`, a window that no buffer of that length holds.
    """
    if num_tokens < 1:
        raise ValueError(
            f"speculative_jacobi(num_tokens={num_tokens}) has no window; it must be at least 1."
        )
    build = grow.chain(num_tokens, choose)

    def init(batch_size: int, max_length: int) -> SpeculativeJacobiState:
        check_window("speculative_jacobi", num_tokens, max_length)
        return SpeculativeJacobiState(
            jnp.full((batch_size, num_tokens), -1, jnp.int32),
            jnp.zeros((batch_size, num_tokens, target.vocab_size)),
            jnp.zeros([batch_size], jnp.int32),
        )

    def propose(
        params: Params, rng_keys: Keys, state: SpeculativeJacobiState, context: Context
    ) -> tuple[Draft, SpeculativeJacobiState]:
        del params

        def expand(
            carry: Any, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Any]:
            del tokens, parents, mask
            return state.logits[:, depth, None], carry

        draft = build.grow(expand, rng_keys, context, state.logits[:, 0], None)
        drawn = draft.tokens[:, 1:]
        return draft, SpeculativeJacobiState(drawn, state.logits, state.num_known)

    def observe(
        params: Params, state: SpeculativeJacobiState, context: Context, outcome: Outcome
    ) -> SpeculativeJacobiState:
        del params, context
        verdict, count = outcome.verdict, outcome.verdict.num_nodes
        node, found = swept(outcome, state.tokens)
        last = jnp.take_along_axis(verdict.path, jnp.maximum(count - 1, 0)[:, None], 1)
        node = jnp.where(found, node, last)
        tokens, drawn = moved(state.tokens, count)
        place = count[:, None] + jnp.arange(num_tokens)
        keeps = ~found & (place < state.num_known[:, None])
        gained = count > 0
        # A row that gained nothing moves nothing: only its laws have to be kept from change.
        is_old = keeps | ~gained[:, None]

        def fresh() -> Array:
            b, n, v = outcome.output.logits.shape
            row = node + n * jnp.arange(b, dtype=jnp.int32)[:, None]
            return gather(outcome.output.logits.reshape(b * n, v), row, 1)[:, :, 0]

        def mixed() -> Array:
            return jnp.where(is_old[..., None], moved(state.logits, count)[0], fresh())

        return SpeculativeJacobiState(
            jnp.where(drawn, tokens, -1),
            # While this drafter is at work every law is new.
            lax.cond(is_old.any(), mixed, fresh),
            jnp.where(gained, (found | keeps).sum(1, dtype=jnp.int32), state.num_known),
        )

    return Drafter(init, propose, observe, build.proposal, target.vocab_size)
