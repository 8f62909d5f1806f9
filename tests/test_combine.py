"""Drafters made of drafters: cascades by enumeration, glued trees and chains, switches.

All of them go through the laws, too.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EOS_ID, draft_model, target

from specjax import engine, exactness, schedulers, testing
from specjax.conformance import SLOTS, plain, scenario
from specjax.drafters import grow
from specjax.drafters.cascade import cascade
from specjax.drafters.combine import alternate, combine
from specjax.drafters.horizontal import horizontal
from specjax.drafters.lookup import lookup
from specjax.drafters.model import model
from specjax.drafters.none import none
from specjax.laboratory import Factory, Pair, Parts, tabular_pair
from specjax.models.tabular import random_table, tabular
from specjax.sampling import sampling
from specjax.types import Decoder, Drafter, Params, Verifier
from specjax.verifiers.block import block
from specjax.verifiers.gbv import gbv
from specjax.verifiers.kseq import kseq
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection
from specjax.verifiers.traversal import traversal

V = 2
SMALL = jnp.asarray(random_table(np.random.default_rng(7), V), jnp.float32)
WOR, IID = grow.without_replacement(), grow.independent()
Rule = Callable[[], Verifier]
slow = pytest.mark.slow


def passes(factory: Factory, vocab_size: int = V) -> dict[str, Any]:
    check = exactness.enumeration(factory, tabular_pair(vocab_size))
    assert check.passed, check.verdict
    assert len(check.figures["expected_tokens"]) == 2, "two steps"
    assert check.figures["expected_tokens"][0] > 1.1, "something was accepted"
    return check.figures


# ---------------------------------------------------------------------------------------- cascades


def lossy(rule: Rule) -> Rule:
    return lambda: rule()._replace(lossless=False)


def inner_decoder(pair: Pair, rule: Rule, num_tokens: int = 1) -> Decoder:
    """The draft model behind a smaller one."""
    choose = grow.coupled() if rule is match else WOR
    return engine.decoder(pair.draft, model(tabular(V), grow.chain(num_tokens, choose)), rule())


def cascaded(inner: Rule, outer: Rule) -> Factory:
    def factory(pair: Pair) -> Parts:
        drafter = cascade(inner_decoder(pair, inner), 2)
        return Parts(drafter, Params(pair.draft_params, SMALL), outer())

    return factory


CHAIN_RULES = (match, rejection, block, traversal, kseq, gbv)
CASCADES = [(match, outer) for outer in (match, rejection)]
CASCADES += [(inner, outer) for inner in (rejection, block) for outer in CHAIN_RULES]
QUICK = {(match, rejection), (rejection, traversal)}


@pytest.mark.parametrize(
    ("inner", "outer"),
    [pytest.param(*pair, marks=() if pair in QUICK else slow) for pair in CASCADES],
)
def test_cascades_are_exact(inner: Rule, outer: Rule) -> None:
    passes(cascaded(inner, outer))


@pytest.mark.parametrize("outer", [block, traversal, kseq, gbv])
def test_a_coupled_inner_rule_is_refused_by_most(outer: Rule) -> None:
    check = exactness.enumeration(cascaded(match, outer), tabular_pair(V))
    assert "proposes law 'coupled' but the verifier is lossless for" in check.verdict


@slow
@pytest.mark.parametrize("outer", [match, rejection, traversal])
def test_an_inner_rule_that_is_not_lossless_drafts_points(outer: Rule) -> None:
    figures = passes(cascaded(lossy(rejection), outer))
    assert figures["expected_tokens"][0] > 1.1
    assert cascade(inner_decoder(tabular_pair(V), lossy(rejection)), 2).proposal.law == "point"


@slow
@pytest.mark.parametrize("outer", [rejection, block])
def test_three_levels_are_exact(outer: Rule) -> None:
    """A cascade in front of the middle model, whose own drafter is a cascade."""

    def factory(pair: Pair) -> Parts:
        smallest = cascade(inner_decoder(pair, rejection), 1)
        middle = engine.decoder(pair.draft, smallest, block())
        params = Params(pair.draft_params, Params(pair.draft_params, SMALL))
        return Parts(cascade(middle, 2), params, outer())

    passes(factory)


@slow
def test_a_cascade_accepts_what_its_middle_model_does() -> None:
    """Its drafts follow the middle model's law, so a rule keeps as many as of that model's own."""

    def alone(pair: Pair) -> Parts:
        return Parts(model(pair.draft, grow.chain(2, WOR)), pair.draft_params, rejection())

    expected = passes(alone)["expected_tokens"]
    found = passes(cascaded(block, rejection))["expected_tokens"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ------------------------------------------------------------------------------ glued and alternate


def sources(*choose: grow.Choose) -> Callable[[Pair], tuple[list[Drafter], tuple]]:
    def make(pair: Pair) -> tuple[list[Drafter], tuple]:
        models = (pair.draft, tabular(V)), (pair.draft_params, SMALL)
        builds = [grow.chain(1 + (i == 0), c) for i, c in enumerate(choose)]
        return [model(m, b) for m, b in zip(models[0], builds, strict=True)], models[1]

    return make


GLUED = {
    "points": (sources(grow.best(), grow.best()), "point", (rejection, match, traversal)),
    "point and sampled": (sources(grow.best(), WOR), "general", (traversal, rejection, match)),
    "sampled": (sources(WOR, WOR), "general", (rejection, traversal, match)),
    "coupled and sampled": (sources(grow.coupled(), WOR), "coupled", (rejection, match)),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=() if rule is rules[0] and "point" not in name else slow)
        for name, (_, _, rules) in GLUED.items()
        for rule in rules
    ],
)
def test_glued_trees_are_exact(name: str, rule: Rule) -> None:
    make, law, _ = GLUED[name]

    def factory(pair: Pair) -> Parts:
        drafters, params = make(pair)
        assert combine(drafters).proposal == (law, 4, 2)
        return Parts(combine(drafters), params, rule())

    passes(factory)


def test_glued_trees_keep_their_nodes() -> None:
    """Against the two drafts, node by node."""
    small, weights = draft_model()
    tree = model(small, grow.static((-1, 0, 0, 1), grow.best()))
    drafters = (tree, lookup(2))
    decoder = engine.decoder(target()[0], combine(drafters), match())
    batch = scenario(5).take(np.arange(8))
    params = Params(target()[1], (weights, ()))
    state = engine.prefill(decoder, params, *batch, SLOTS)
    together = (combine(drafters), alternate(0, drafters), alternate(1, drafters))

    @jax.jit
    def propose(state: Any) -> list[Any]:
        arguments = (params, state.rng_keys, state.drafter, state.context)
        return [drafter.propose(*arguments)[0] for drafter in together]

    glued, first, second = propose(state)
    tokens = np.concatenate([first.tokens, second.tokens[:, 1:]], 1)
    np.testing.assert_array_equal(glued.tokens, tokens)
    np.testing.assert_array_equal(glued.parents[0], [-1, 0, 0, 1, 0, 4])
    np.testing.assert_array_equal(glued.num_drafted, first.num_drafted + second.num_drafted)
    assert glued.depth == 2


# -------------------------------------------------------------------------------------- one behind


@pytest.mark.parametrize("rule", [block, pytest.param(rejection, marks=slow)])
def test_horizontal_cascades_are_exact(rule: Rule) -> None:
    def factory(pair: Pair) -> Parts:
        drafter = horizontal(model(pair.draft, grow.chain(1, WOR)), lookup(1))
        assert drafter.proposal == ("chain", 3, 2)
        return Parts(drafter, (pair.draft_params, ()), rule())

    passes(factory, 3)


def test_the_second_goes_on_where_the_first_ends() -> None:
    decoder = engine.decoder(target()[0], horizontal(lookup(1), lookup(3)), match())
    prompt = np.array([[1, 2, 3, 1, 2, 4, 1, 2]], np.int32)
    state = engine.prefill(
        *(decoder, Params(target()[1], ((), ())), jax.random.split(jax.random.key(0), 1)),
        *(sampling(1), prompt, np.array([8]), np.array([20]), 20),
    )
    drafter = horizontal(lookup(1), lookup(3))
    params = Params((), ((), ()))
    draft, _ = drafter.propose(params, state.rng_keys, state.drafter, state.context)
    # After "1 2" came 4, and after "2 4" came 1 and 2, then the drafted 4 again.
    assert draft.tokens[0].tolist() == [2, 4, 1, 2, 4]


# ------------------------------------------------------------------------------------------- switch


def switched(costs: tuple[float, ...] = (1.0, 1.0)) -> tuple[Decoder, Params]:
    """The target as its own drafter, which is always right, or none."""
    net, weights = target()
    drafters = (none(), model(net, grow.chain(3, grow.coupled())))
    decoders = [
        engine.decoder(net, alternate(i, drafters), match(), eos_ids=(EOS_ID,)) for i in range(2)
    ]
    return schedulers.switch(decoders, costs), Params(weights, ((), weights))


def test_a_switch_writes_the_same_and_finds_the_better_drafter() -> None:
    batch = scenario(5)
    decoder, params = switched()
    state = engine.decode(decoder, params, *batch, SLOTS)
    tokens, length = plain()
    np.testing.assert_array_equal(state.context.length, length)
    written = np.arange(SLOTS) < length[:, None]
    np.testing.assert_array_equal(np.asarray(state.context.tokens)[written], tokens[written])
    gained = length - batch.prompt_length
    assert gained.sum() > 2.5 * int(state.num_steps.sum())
    text = engine.decode.lower(decoder, params, *batch, SLOTS).compile().as_text()
    shapes = {(1024, 1, SLOTS, 8)}
    assert testing.whole_buffer_ops(text, shapes) == Counter()
    jax.clear_caches()


@slow
def test_a_switch_weighs_costs() -> None:
    """The perfect drafter's steps cost ten times as much: after one try none drafts."""
    batch = scenario(5)
    decoder, params = switched((1.0, 10.0))
    state = engine.decode(decoder, params, *batch, SLOTS)
    np.testing.assert_array_equal(state.context.length, plain().length)
    longest = int(state.num_steps.max())
    assert longest > 10
    estimates = np.asarray(state.drafter.tokens_per_step)
    assert estimates.shape == (1024, 2)
    assert (estimates[:, 0] <= 1).all()


# ---------------------------------------------------------------------------------------- refusals


def of_size(vocab_size: int) -> Drafter:
    return model(tabular(vocab_size), grow.chain(1, WOR))


TREE = model(tabular(V), grow.static((-1, 0, 0), grow.best()))
REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty cascade": (
        lambda: cascade(inner_decoder(tabular_pair(V), match), 0),
        "cascade of 0 tokens .* at least 1",
    ),
    "nothing to combine": (lambda: combine(()), "0 drafters .* at least 1"),
    "two vocabularies": (lambda: combine((of_size(2), of_size(3))), "vocabularies of 2 and 3"),
    "no such drafter": (lambda: alternate(2, (none(), none())), "Drafter 2 .* there are 2"),
    "a tree in a chain": (lambda: horizontal(TREE, lookup(1)), "has 3 nodes at depth 1; need 2"),
    "a tree behind a chain": (lambda: horizontal(lookup(1), TREE), "3 nodes at depth 1; need 2"),
    "no decoders": (lambda: schedulers.switch((), ()), "0 decoders with costs"),
    "missing costs": (
        lambda: schedulers.switch((inner_decoder(tabular_pair(V), match),), (1.0, 2.0)),
        r"1 decoders with costs \(1.0, 2.0\)",
    ),
    "free steps": (
        lambda: schedulers.switch((inner_decoder(tabular_pair(V), match),), (0.0,)),
        r"costs \(0.0,\); .* above 0",
    ),
    "a long memory": (
        lambda: schedulers.switch((inner_decoder(tabular_pair(V), match),), (1.0,), memory=1.5),
        "memory is 1.5 .* lie in",
    ),
    "a cascade over another vocabulary": (
        lambda: engine.decoder(
            target()[0], cascade(inner_decoder(tabular_pair(V), match), 2), match()
        ),
        "vocabulary has 2 tokens and the target's 5",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_combinations_are_refused(name: str) -> None:
    make, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        make()
