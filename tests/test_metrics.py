"""What `metrics` counts is what the steps did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import engine, metrics, sampling
from specjax.drafters import grow
from specjax.drafters.lookup import lookup
from specjax.drafters.model import model
from specjax.metrics import Acceptance
from specjax.testing import tiny_model
from specjax.types import Decoder, DecodeState, Drafter, Params, PyTree
from specjax.verifiers.match import match

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


def test_summary_of_nothing() -> None:
    figures = metrics.summary(metrics.empty(2, 1))
    assert figures["mat"] is None
    assert figures["acceptance_rate"] is None
    assert figures["alpha_pos"] == [None]
