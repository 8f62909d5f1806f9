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

Intervals hold 95 %. Prompts are independent and the steps of one prompt are not, so means over
steps are ratios of two sums over prompts, whose error is the delta method's: prompt i pulls the
ratio R of its tokens t to its steps s by (t_i - R s_i) / mean(s), and R has the variance of a mean
of these. With fewer than about 20 prompts the interval is a little too short. Of two methods the
pulls are subtracted prompt by prompt, so that what makes a prompt easy for both cancels.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specjax.kernels.vocabulary import softmax
from specjax.types import Array, Decoder, DecodeState, Drafter, Params, StepInfo

_QUANTILE = 1.96  # of the normal law: 2.5 % lie above


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


class FirstTokens(NamedTuple):
    """The first drafted token of every step, by row."""

    steps: np.ndarray  # [B]
    accepted: np.ndarray  # [B], the steps that kept it
    expected: np.ndarray  # [B], the sum of its chances by a formula


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
    """All rows' figures together, named as above, and `mat` by prompt; None where nothing was
    counted. Rows without a step pad a batch and are no prompts.
    """
    by_row = np.asarray(acceptance.histogram)
    by_row = by_row[by_row.sum(1) > 0]
    gained = np.arange(by_row.shape[1])
    steps_by_prompt, tokens_by_prompt = by_row.sum(1), by_row @ gained
    histogram = by_row.sum(0)
    drafted, steps = int(np.asarray(acceptance.drafted).sum()), int(histogram.sum())
    accepted = int((histogram * np.maximum(gained - 1, 0)).sum())
    # reached[k]: steps that accepted at least k, k = 0 .. D.
    reached = np.cumsum(histogram[::-1])[::-1][1:]
    mat = int(tokens_by_prompt.sum()) / steps if steps else None
    return {
        "mat": mat,
        "mat_interval": _interval(mat, _pulls(tokens_by_prompt, steps_by_prompt)),
        "accepted_per_step": accepted / steps if steps else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "joint_pos": [float(r / steps) if steps else None for r in reached[1:]],
        "alpha_pos": [
            float(r / before) if before else None for before, r in itertools.pairwise(reached)
        ],
        "histogram": histogram.tolist(),
        "mat_by_prompt": (tokens_by_prompt / steps_by_prompt).tolist(),
        "steps_by_prompt": steps_by_prompt.tolist(),
    }


def _pulls(counts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """How far each prompt pulls counts.sum() / steps.sum() its way, [prompts]; they sum to 0."""
    if not len(steps):
        return np.zeros(0)
    return (counts - counts.sum() / steps.sum() * steps) / steps.mean()


def _interval(value: float | None, pulls: np.ndarray) -> list[float] | None:
    """About `value`, a mean over prompts that is pulled so; None where one prompt tells nothing."""
    if value is None or len(pulls) < 2:
        return None
    half = _QUANTILE * float(pulls.std(ddof=1)) / len(pulls) ** 0.5
    return [value - half, value + half]


def pooled(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several summaries of the same prompts as one, prompt by prompt: mat and its interval."""
    steps = np.sum([s["steps_by_prompt"] for s in summaries], 0)
    tokens = np.sum([np.multiply(s["mat_by_prompt"], s["steps_by_prompt"]) for s in summaries], 0)
    mat = float(tokens.sum() / steps.sum())
    return {
        "mat": mat,
        "mat_interval": _interval(mat, _pulls(tokens, steps)),
        "mat_by_prompt": (tokens / steps).tolist(),
        "steps_by_prompt": steps.tolist(),
    }


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """By how much the `mat` of one summary exceeds that of another one of the same prompts."""

    def pulls(figures: Mapping[str, Any]) -> np.ndarray:
        steps = np.asarray(figures["steps_by_prompt"])
        return _pulls(figures["mat_by_prompt"] * steps, steps)

    value = ours["mat"] - theirs["mat"]
    return {"difference": value, "interval": _interval(value, pulls(ours) - pulls(theirs))}


# ------------------------------------------------------------------- what a formula says of it


def first_tokens(
    drafter: Drafter,
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    formula: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> FirstTokens:
    """Decodes to the end and asks, of every step, for the chance of its first drafted token.

    Args:
        drafter: the decoder's, of a single path of drawn tokens.
        decoder: under a rule that, having refused a token, never emits it in its place: `match`
            and `rejection`. Then what is emitted tells whether it was kept, however the step is
            cut.
        params: its weights.
        state: consumed.
        formula: (p [..., V], q [..., V]) -> [...], the acceptance of a token drawn from q; one of
            `theory`.
    """
    batch_size = state.done.shape[0]
    steps, accepted, expected = (np.zeros(batch_size) for _ in range(3))
    while not state.done.all():
        active = ~np.asarray(state.done)
        state, p, q, kept = _revealing_step(drafter, decoder, params, state)
        steps += active
        accepted += active & np.asarray(kept)
        expected[active] += formula(np.asarray(p)[active], np.asarray(q)[active])
    return FirstTokens(steps, accepted, expected)


@functools.partial(jax.jit, static_argnames=("drafter", "decoder"), donate_argnames="state")
def _revealing_step(
    drafter: Drafter, decoder: Decoder, params: Params, state: DecodeState
) -> tuple[DecodeState, Array, Array, Array]:
    """A step, the laws p and q [B, V] of its first drafted token, and whether that was kept [B]."""
    # A drafter is a function: asked twice, it proposes the same.
    draft, _ = drafter.propose(params, state.rng_keys, state.drafter, state.context)
    state, info = decoder.step(params, state)
    kept = info.tokens[:, 0] == draft.tokens[:, 1]
    return state, softmax(info.warped_logits[:, 0]), draft.probs[:, 1], kept


def agreement(found: FirstTokens) -> dict[str, Any]:
    """The share of steps that kept their first drafted token beside what the formula expects of
    the very same steps, and the interval of the difference; None where nothing was counted.
    """
    steps, accepted, expected = (x[found.steps > 0] for x in found)
    if not len(steps):
        return dict.fromkeys(("accepted", "expected", "difference", "interval"))
    value = float((accepted - expected).sum() / steps.sum())
    return {
        "accepted": float(accepted.sum() / steps.sum()),
        "expected": float(expected.sum() / steps.sum()),
        "difference": value,
        "interval": _interval(value, _pulls(accepted - expected, steps)),
    }
