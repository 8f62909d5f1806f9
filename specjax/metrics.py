"""How much of what was drafted was kept, and how long it took.

Names differ between papers and tools; here they mean:

    mat                tokens per target pass after the prompt, the target's own token included;
                       plain decoding has 1
    accepted_per_step  the same without the target's own token: mat - 1
    acceptance_rate    accepted / drafted nodes; fillers are not counted, siblings are
    joint_pos[k]       share of steps that accepted more than k drafted tokens, k = 0 .. D - 1
    alpha_pos[k]       the same among the steps that accepted k: joint_pos[k] / joint_pos[k - 1]
    histogram[n]       number of steps that gained n tokens

A step that EOS or the row's limit cuts short counts as one that accepted less: what it gained is
what the row gained.
"""

import functools
import itertools
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.types import Array, Decoder, DecodeState, Params, StepInfo


@struct.dataclass
class Acceptance:
    """What the steps of a decode accepted, by row."""

    histogram: Array  # [B, P + 1] int32, steps by tokens gained
    drafted: Array  # [B] int32, nodes that were neither root nor filler


class Timing(NamedTuple):
    """One pass over one batch on the clock."""

    tokens: list[np.ndarray]  # what each prompt was continued with
    num_timed: int  # how many of all these tokens `seconds` paid for
    seconds: float  # decoding after the prompt
    seconds_prefill: float


def empty(batch_size: int, depth: int) -> Acceptance:
    """No steps yet, of trees up to `depth`."""
    return Acceptance(
        jnp.zeros((batch_size, depth + 2), jnp.int32), jnp.zeros(batch_size, jnp.int32)
    )


def update(acceptance: Acceptance, active: Array, info: StepInfo) -> Acceptance:
    """Adds a step of the rows that were not done before it, `active` [B]."""
    gained = jax.nn.one_hot(info.num_tokens, acceptance.histogram.shape[1], dtype=jnp.int32)
    return Acceptance(
        acceptance.histogram + gained * active[:, None],
        acceptance.drafted + jnp.where(active, info.num_drafted, 0),
    )


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def measure(
    decoder: Decoder, params: Params, state: DecodeState, num_steps: int | Array
) -> tuple[DecodeState, Acceptance]:
    """`engine.advance` that keeps count, apart from it so that what is timed counts nothing."""

    def unfinished(carry: tuple[Array, DecodeState, Acceptance]) -> Array:
        i, state, _ = carry
        return (i < num_steps) & ~state.done.all()

    def step(
        carry: tuple[Array, DecodeState, Acceptance],
    ) -> tuple[Array, DecodeState, Acceptance]:
        i, state, acceptance = carry
        active = ~state.done
        state, info = decoder.step(params, state)
        return i + 1, state, update(acceptance, active, info)

    nothing = empty(state.done.shape[0], decoder.proposal.depth)
    return lax.while_loop(unfinished, step, (jnp.int32(0), state, nothing))[1:]


def summary(acceptance: Acceptance) -> dict[str, Any]:
    """All rows' figures together, named as above; None where nothing was counted."""
    histogram = np.asarray(acceptance.histogram).sum(0)
    drafted, steps = int(np.asarray(acceptance.drafted).sum()), int(histogram.sum())
    accepted = int((histogram * np.maximum(np.arange(len(histogram)) - 1, 0)).sum())
    tokens = int((histogram * np.arange(len(histogram))).sum())
    # reached[k]: steps that accepted at least k, k = 0 .. D.
    reached = np.cumsum(histogram[::-1])[::-1][1:]
    return {
        "mat": tokens / steps if steps else None,
        "accepted_per_step": accepted / steps if steps else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "joint_pos": [float(r / steps) if steps else None for r in reached[1:]],
        "alpha_pos": [
            float(r / before) if before else None for before, r in itertools.pairwise(reached)
        ],
        "histogram": histogram.tolist(),
    }
