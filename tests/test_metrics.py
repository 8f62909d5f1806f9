"""What `metrics` counts is what the steps did."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import engine, evaluation, metrics, sampling, theory
from specjax.drafters import grow
from specjax.drafters.lookup import lookup
from specjax.drafters.model import model
from specjax.metrics import Acceptance
from specjax.testing import tiny_model
from specjax.types import Decoder, DecodeState, Drafter, Params, PyTree, Verifier
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

LENGTH = jnp.array([6, 1, 4], jnp.int32)
LIMIT = jnp.array([30, 25, 1], jnp.int32)  # the last row is done from the start
TARGET, WEIGHTS = tiny_model(32)


def start(drafter: Drafter, weights: PyTree) -> tuple[Decoder, Params, DecodeState]:
    decoder = engine.decoder(TARGET, drafter, match())
    params = Params(WEIGHTS, weights)
    prompt = jax.random.randint(jax.random.key(3), (3, 6), 0, 32)
    keys = jax.random.split(jax.random.key(0), 3)
    how = sampling.sampling(3, 1.0)
    state = engine.prefill(decoder, params, keys, how, prompt, LENGTH, LIMIT, 32)
    return decoder, params, state


def test_counting_changes_nothing_and_misses_nothing() -> None:
    decoder, params, state = start(lookup(3), ())
    plain = engine.advance(decoder, params, jax.tree.map(jnp.copy, state), 32)
    state, acceptance = metrics.measure(decoder, params, state, 32)
    np.testing.assert_array_equal(plain.context.tokens, state.context.tokens)
    np.testing.assert_array_equal(plain.num_steps, state.num_steps)
    histogram = np.asarray(acceptance.histogram)
    assert histogram.shape == (3, 5)
    np.testing.assert_array_equal(histogram.sum(1), state.num_steps)
    gained = np.asarray(state.context.length - LENGTH)
    np.testing.assert_array_equal((histogram * np.arange(5)).sum(1)[:2], gained[:2])
    assert (acceptance.drafted[:2] <= 3 * state.num_steps[:2]).all()
    assert acceptance.histogram[2].sum() == acceptance.drafted[2] == 0


def test_a_target_that_drafts_for_itself_is_always_accepted() -> None:
    decoder, params, state = start(model(TARGET, grow.chain(3, grow.coupled())), WEIGHTS)
    state, acceptance = metrics.measure(decoder, params, state, 32)
    steps = np.asarray(state.num_steps)
    np.testing.assert_array_equal(steps, [6, 6, 0])  # 24 tokens by 4
    np.testing.assert_array_equal(acceptance.drafted, 3 * steps)
    figures = metrics.summary(acceptance)
    assert figures["mat"] == 4
    assert figures["acceptance_rate"] == 1
    assert figures["joint_pos"] == figures["alpha_pos"] == [1, 1, 1]


def test_summary_by_hand() -> None:
    # Ten steps: four gained 1 token, three 2, one 3, two 4; every step drafted three.
    acceptance = Acceptance(jnp.array([[0, 4, 0, 1, 2], [0, 0, 3, 0, 0]]), jnp.array([21, 9]))
    figures = metrics.summary(acceptance)
    assert figures["histogram"] == [0, 4, 3, 1, 2]
    assert figures["mat"] == pytest.approx(2.1)
    assert figures["accepted_per_step"] == pytest.approx(1.1)
    assert figures["acceptance_rate"] == pytest.approx(11 / 30)
    assert figures["joint_pos"] == pytest.approx([0.6, 0.3, 0.2])
    assert figures["alpha_pos"] == pytest.approx([0.6, 0.5, 2 / 3])
    # The rows gained 15 tokens in 7 steps and 6 in 3, .3 more and less than 2.1 a step, and took 5
    # steps on average: they pull by .06 and -.06, whose mean has the standard error .06.
    assert figures["mat_interval"] == pytest.approx([2.1 - 1.96 * 0.06, 2.1 + 1.96 * 0.06])
    assert figures["mat_by_prompt"] == pytest.approx([15 / 7, 2])
    assert figures["steps_by_prompt"] == [7, 3]


def test_rows_that_pad_a_batch_are_no_prompts() -> None:
    rows = [[0, 4, 0, 1], [0, 0, 3, 0], [0, 0, 0, 0]]
    padded = metrics.summary(Acceptance(jnp.array(rows), jnp.array([10, 6, 0])))
    assert padded == metrics.summary(Acceptance(jnp.array(rows[:2]), jnp.array([10, 6])))


def test_difference_by_hand() -> None:
    ours = metrics.summary(Acceptance(jnp.array([[0, 1, 1], [0, 0, 2]]), jnp.array([2, 2])))
    theirs = metrics.summary(Acceptance(jnp.array([[0, 2, 0], [0, 1, 1]]), jnp.array([2, 2])))
    # 1.75 and 1.25 tokens a step; both pull by -.25 and .25, so that only the difference is left.
    found = metrics.difference(ours, theirs)
    assert found["difference"] == pytest.approx(0.5)
    assert found["interval"] == pytest.approx([0.5, 0.5])
    assert metrics.difference(ours, ours) == {"difference": 0, "interval": [0, 0]}
    alone = metrics.summary(Acceptance(jnp.array([[0, 1, 1]]), jnp.array([2])))
    assert alone["mat_interval"] is metrics.difference(alone, alone)["interval"] is None


def test_intervals_hold_as_often_as_they_say() -> None:
    # Prompts differ in how easy they are and in how many tokens they have. Each step gains one
    # token or two, with a chance of the prompt's that is higher by a tenth under the first rule.
    rng = np.random.default_rng(0)
    repeats, num_prompts = 1000, 60
    chance = rng.beta(2, 2, (repeats, num_prompts, 1)) * 0.9 + [0.1, 0]
    steps = np.broadcast_to(rng.choice([10, 30], (repeats, num_prompts, 1)), chance.shape)
    accepted = rng.binomial(steps, chance)
    histogram = np.stack([np.zeros_like(steps), steps - accepted, accepted], -1)
    held, paired, widths = 0, 0, []
    for drawn in histogram:
        ours, theirs = (metrics.summary(Acceptance(drawn[:, i], steps[0, :, 0])) for i in (0, 1))
        found = metrics.difference(ours, theirs)
        held += ours["mat_interval"][0] <= 1.55 <= ours["mat_interval"][1]
        paired += found["interval"][0] <= 0.1 <= found["interval"][1]
        widths.append([np.ptp(ours["mat_interval"]), np.ptp(found["interval"])])
    assert 0.92 < held / repeats < 0.97
    assert 0.92 < paired / repeats < 0.97
    own, difference = np.mean(widths, 0)
    assert difference < 0.8 * own  # without pairing it would be sqrt(2) times as wide


def test_summary_of_nothing() -> None:
    figures = metrics.summary(metrics.empty(2, 1))
    assert figures["mat"] is None
    assert figures["mat_interval"] is None
    assert figures["mat_by_prompt"] == []
    assert figures["acceptance_rate"] is None
    assert figures["alpha_pos"] == [None]


@pytest.mark.parametrize(
    ("choose", "verifier", "formula", "wrong"),
    [
        (grow.coupled(), match(), theory.coupled_acceptance, theory.overlap),
        pytest.param(
            *(grow.independent(), rejection(), theory.overlap, theory.coupled_acceptance),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(grow.independent(), match(), theory.match_acceptance, theory.coupled_acceptance),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["coupled", "rejection", "match"],
)
def test_first_tokens_are_kept_as_often_as_formulas_say(
    choose: grow.Choose, verifier: Verifier, formula: Callable, wrong: Callable
) -> None:
    draft_model, weights = tiny_model(32, num_layers=1, seed=1)
    drafter = model(draft_model, grow.chain(2, choose))
    # Ends of text and limits cut steps, also where the first drafted token is the end.
    decoder = engine.decoder(TARGET, drafter, verifier, eos_ids=(3, 4))
    b = 192
    prompt = jax.random.randint(jax.random.key(1), (b, 2), 0, 32)

    def found(formula: Callable) -> metrics.FirstTokens:
        state = engine.prefill(
            decoder,
            Params(WEIGHTS, weights),
            jax.random.split(jax.random.key(2), b),
            sampling.sampling(b, 1.5),
            prompt,
            jnp.full([b], 2),
            jnp.where(jnp.arange(b) < 4, 1, 3 + jnp.arange(b) % 40),  # four rows pad the batch
            64,
        )
        return metrics.first_tokens(drafter, decoder, Params(WEIGHTS, weights), state, formula)

    right = found(formula)
    np.testing.assert_array_equal(right.steps[:4], 0)
    figures = metrics.agreement(right)
    low, high = figures["interval"]
    assert abs(figures["difference"]) < high - low  # 3.9 standard errors
    assert figures["difference"] == pytest.approx(figures["accepted"] - figures["expected"])
    low, high = metrics.agreement(found(wrong))["interval"]
    assert low > 0 or high < 0


def test_agreement_of_nothing() -> None:
    nothing = metrics.FirstTokens(np.zeros(2), np.zeros(2), np.zeros(2))
    assert metrics.agreement(nothing)["interval"] is None


def test_pooled_seeds_count_their_steps() -> None:
    """Two seeds of the same two prompts: tokens over steps, prompt by prompt."""
    one = {"mat_by_prompt": [2.0, 3.0], "steps_by_prompt": [10, 4]}
    two = {"mat_by_prompt": [1.0, 2.0], "steps_by_prompt": [30, 6]}
    found = metrics.pooled([one, two])
    assert found["steps_by_prompt"] == [40, 10]
    assert found["mat_by_prompt"] == [50 / 40, 24 / 10]
    assert found["mat"] == pytest.approx(74 / 50)
    low, high = found["mat_interval"]
    # The delta method by hand: pulls (50 - 59.2) / 25 and (24 - 14.8) / 25.
    half = 1.96 * np.std([-9.2 / 25, 9.2 / 25], ddof=1) / 2**0.5
    assert (low, high) == pytest.approx((74 / 50 - half, 74 / 50 + half))
    assert metrics.difference(found, found)["difference"] == 0


def test_teacher_forced_estimate_is_a_chain_of_rates() -> None:
    found = {"acceptance_1": 0.5, "acceptance_2": 0.4, "agreement_1": 1.0}
    estimates = evaluation.teacher_forced(found, depth=3)
    assert estimates[1.0] == pytest.approx(1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.4)
    assert estimates[0.0] == pytest.approx(4)
