"""The laws that every drafter and every verifier keeps, each tested on every row of `cases.CASES`.

Compiling takes most of the time, hence one program per case: one batch shape serves all laws.
"""

import inspect
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    CASES,
    DEFAULTS,
    EOS_ID,
    OF_LAW,
    SLOW,
    TREE,
    VERIFIERS,
    VOCAB_SIZE,
    Case,
    draft_model,
    drafter_of,
    target,
)
from faults import instead, misreported, without_residual

from specjax import cache as caches
from specjax import conformance, drafters, engine, testing, verifiers
from specjax.conformance import ROWS, SLOTS, Batch, Program
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.drafters.none import none
from specjax.enumeration import history
from specjax.kernels import native
from specjax.laboratory import Check, Pair, Parts, transformer_pair
from specjax.models.transformer import TransformerConfig, transformer
from specjax.sampling import sampling
from specjax.types import (
    LAWS,
    Array,
    Cache,
    Context,
    Decoder,
    DecodeState,
    Draft,
    Keys,
    Model,
    ModelOutput,
    Params,
    PyTree,
    Sampling,
    Verdict,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

WIDTH = conformance.WIDTH
# Rows per law, and the total variation that so many find.
FEW, SOME, MANY = (10 * ROWS, 0.07), (20 * ROWS, 0.05), (40 * ROWS, 0.035)


def parts_of(case: Case) -> Callable[[Pair], Parts]:
    return lambda pair: Parts(case.drafter(), case.params(), case.verifier())


def together(name: str) -> tuple[str, ...]:
    """The cases that share a case's program: a drafter's, all but its default if that is alone."""
    drafter = drafter_of(name)
    alone = drafter not in OF_LAW.values()
    if alone and name in DEFAULTS:
        return (name,)
    return tuple(x for x in CASES if drafter_of(x) == drafter and not (alone and x in DEFAULTS))


def marks(name: str) -> list[pytest.MarkDecorator]:
    group = together(name)[0]
    return [pytest.mark.xdist_group(group)] + [pytest.mark.slow] * (name in SLOW)


JUDGED: dict[str, Draft] = {}  # by drafter, the shapes of what verifiers were given


def judging(drafter: str, rules: Sequence[Verifier]) -> Verifier:
    """The rule that `params.verifier` says, or the only one."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        JUDGED[drafter] = jax.tree.map(jax.typeof, draft)
        given = (params, rng_keys, context, draft, output, warped)
        if len(rules) == 1:
            return rules[0].verify(*given)
        choices = [lambda verify=rule.verify: verify(*given) for rule in rules]
        return jax.lax.switch(params.verifier, choices)

    laws = set.intersection(*(set(rule.laws) for rule in rules))
    return rules[0]._replace(verify=verify, laws=tuple(laws))


PROGRAM: dict[tuple[str, ...], Program] = {}  # a single one: cases that share one are neighbours


@pytest.fixture(scope="module", params=[pytest.param(x, marks=marks(x)) for x in CASES])
def program(request: pytest.FixtureRequest) -> Program:
    name: str = request.param
    names = together(name)
    rules = [CASES[x].verifier() for x in names]
    if names not in PROGRAM:
        PROGRAM.clear()
        engine.decode.clear_cache()
        parts = parts_of(CASES[name])(transformer_pair())
        parts = parts._replace(verifier=judging(drafter_of(name), rules))
        PROGRAM[names] = Program(name, lambda _: parts)
    which = names.index(name)
    return PROGRAM[names].judged_by(name, which, rules[which])


def scenario() -> Batch:
    return conformance.scenario(VOCAB_SIZE)


def test_scenario_covers_every_kind_of_end() -> None:
    batch, (tokens, length) = scenario(), conformance.plain()
    new = length - batch.prompt_length
    last = np.take_along_axis(tokens, length[:, None] - 1, 1)[:, 0]
    by_eos = (last == EOS_ID) & (new > 0)
    greedy = np.asarray(batch.sampling.temperature) == 0
    for kind in (greedy, ~greedy):
        ends = {
            "nothing to do": new == 0,
            "EOS at once": by_eos & (new == 1),
            "EOS late": by_eos & (new > 6),
            "limit": ~by_eos & (length == batch.limit) & (new > 0),
            "buffer": ~by_eos & (length == SLOTS) & (batch.limit > SLOTS),
            "one-token prompt": (batch.prompt_length == 1) & (new > 3),
            "full-width prompt": (batch.prompt_length == WIDTH) & (new > 3),
        }
        assert {name: (x & kind).sum() >= 4 for name, x in ends.items()} == dict.fromkeys(
            ends, True
        )


# ---------------------------------------------------------------------------------- 1: losslessness


def passes(check: Check) -> dict[str, Any]:
    assert check.passed, f"{check.name}: {check.verdict}"
    return check.figures


def test_lossless(program: Program) -> None:
    """A part of the rows that the laboratory takes: what they miss, enumeration does not."""
    name = program.name
    num_rows, fault = SOME if name in DEFAULTS else MANY if name in SLOW else FEW
    passes(conformance.sampled_law(program, len(CASES), num_rows))
    cells = max(int((law > 0).sum()) for law in conformance.exact_laws())
    assert testing.power(num_rows, cells, fault, 2 * len(CASES)) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [pytest.param(x, marks=marks(x)) for x in CASES if x not in {*DEFAULTS, *SLOW}],
    indirect=True,
)
def test_lossless_in_many_rows(program: Program) -> None:
    passes(conformance.sampled_law(program, len(CASES), MANY[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [pytest.param(x, marks=marks(x)) for x in DEFAULTS],
    indirect=True,
)
def test_lossless_to_two_hundredths(program: Program) -> None:
    """Every drafter; with other verifiers it draws from the same laws."""
    figures = passes(conformance.sampled_law(program, len(CASES)))
    # A fault of this total variation is found, whatever its form.
    assert figures["fault"] == 0.02
    assert figures["power"] >= 0.99


def test_laws_are_uneven_and_truncated() -> None:
    """On laws near uniform, or the draft model's own, every rule would look lossless."""
    horizon = conformance.HORIZON
    for law, p in zip(conformance.LAWS, conformance.exact_laws(), strict=True):
        uncut = {"temperature": law.sampling["temperature"]}
        plain = testing.exact_law(*target(), law.prompt, sampling(1, **uncut), horizon, EOS_ID)
        here = sampling(1, **law.sampling)
        q = testing.exact_law(*draft_model(), law.prompt, here, horizon, EOS_ID)
        assert (p > 0).sum() < (plain > 0).sum()
        assert abs(p - 1 / len(p)).sum() / 2 > 0.3
        assert 0.3 < abs(p - q).sum() / 2 < 0.9


@pytest.mark.parametrize(
    "fault", ["misreported probs", pytest.param("no residual", marks=pytest.mark.slow)]
)
def test_sampling_finds_faults(fault: str) -> None:
    """Enumeration finds them all, `test_exactness.py`; these the statistical test has to find."""
    choose = grow.without_replacement()
    if fault == "misreported probs":
        choose = instead(choose, misreported)
    build = grow.chain(1, choose)
    rule = without_residual if fault == "no residual" else rejection
    faulty = Program(fault, lambda pair: Parts(model(pair.draft, build), pair.draft_params, rule()))
    assert not conformance.sampled_law(faulty, len(CASES), SOME[0]).passed
    jax.clear_caches()


# -------------------------------------------------------------- 2, 3, 4: text determined by the row


def test_text_equals_plain_decoding(program: Program) -> None:
    """Laws 2 and 3: greedy rows always, and under `match` sampled rows too, whatever the draft."""
    passes(conformance.greedy_identity(program))
    is_match = program.name.endswith("/match")
    assert program.parts.verifier.drafter_invariant == is_match
    if is_match:
        passes(conformance.invariance(program))


def test_every_row_ends_where_it_should(program: Program) -> None:
    passes(conformance.ends(program))


def test_drafts_are_accepted(program: Program) -> None:
    """Laws about acceptance say nothing if nothing is accepted."""
    gained = program.result.length - scenario().prompt_length
    steps, depth = program.result.num_steps, program.decoder.proposal.depth
    assert ((steps == 0) == (gained == 0)).all()
    assert gained.sum() > (1 if depth == 0 else 1.1) * steps.sum() - (depth == 0)


def test_rows_are_independent(program: Program) -> None:
    """Law 4: neither a row's place nor its neighbours' prompts, limits and sampling matter."""
    assert passes(conformance.row_independence(program))["compared"] > ROWS // 2


def test_foreign_drafts_leave_no_trace(program: Program) -> None:
    """Every drafter may be one of several: what it observes need not be its own."""
    check = conformance.foreign_drafts(program)
    assert {"undisturbed", "disturbed"} <= set(passes(check)), check.verdict


def test_caches_hold_what_a_prefill_would(program: Program) -> None:
    assert passes(conformance.cached_history(program))["rows"] > 100


@pytest.mark.parametrize("wrong", [np.nan, 1.0])
@pytest.mark.parametrize(
    "program",
    [pytest.param("none/match", marks=pytest.mark.xdist_group("none/match"))],
    indirect=True,
)
def test_a_wrong_cache_is_found(
    program: Program, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(cache: Cache) -> Cache:
        keys = cache.keys[0].copy()
        keys[:, :, 0] += wrong
        return cache.replace(keys=(keys, *cache.keys[1:]))

    result = program.result
    caches = [spoilt(cache) for cache in result.caches]
    monkeypatch.setattr(program, "result", result._replace(caches=caches))
    assert not conformance.cached_history(program).passed


@pytest.mark.slow
def test_the_laws_hold_without_kernels() -> None:
    """This very file, by XLA's own operations."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__]
    environment = {**os.environ, "SPECJAX_CPU_KERNELS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_bfloat16_leaves_float32_by_rounding_only() -> None:
    figures = passes(conformance.bfloat16_margin(parts_of(CASES["none/match"])))
    assert 0 < figures["different_rows"] < ROWS // 8
    assert 0 < figures["largest_margin"] < figures["rounding"] < 0.5, "laws differ by more"
    jax.clear_caches()


@pytest.mark.parametrize("fault", ["forgets", pytest.param("NaN", marks=pytest.mark.slow)])
def test_bfloat16_excuses_no_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = {kind: transformer_pair(dtype=kind) for kind in (jnp.float32, jnp.bfloat16)}
    pair = of[jnp.bfloat16]

    def forgetful(*arguments: Any, block: Any = None) -> Any:
        """A cache without its newest slot."""
        *given, cache = arguments
        shorter = cache.replace(length=jnp.maximum(cache.length - 1, 0))
        return pair.target.apply(*given, shorter, block)

    if fault == "forgets":
        of[jnp.bfloat16] = pair._replace(target=pair.target._replace(apply=forgetful))
    else:
        nothing = jax.tree.map(lambda x: x * np.nan, pair.target_params)
        of[jnp.bfloat16] = pair._replace(target_params=nothing)
    monkeypatch.setattr(conformance, "transformer_pair", lambda dtype=jnp.float32: of[dtype])
    assert not conformance.bfloat16_margin(parts_of(CASES["none/match"])).passed
    jax.clear_caches()


@pytest.mark.parametrize(
    "name",
    [
        "lookup/rejection",
        pytest.param("model chain without_replacement/rejection", marks=pytest.mark.slow),
    ],
)
def test_eos_only_cuts(name: str) -> None:
    """Where private draws decide, the text up to an EOS is that of a decoder which knows no EOS."""
    case = CASES[name]
    cutting, endless = (Program(name, parts_of(case), eos_ids) for eos_ids in ((EOS_ID,), ()))
    batch = scenario()
    expected = endless.result
    length = testing.cut(expected.tokens, batch.prompt_length, expected.length, (EOS_ID,))
    assert (length < expected.length).sum() > ROWS // 8
    np.testing.assert_array_equal(cutting.result.length, length)
    written = np.arange(SLOTS) < length[:, None]
    np.testing.assert_array_equal(cutting.result.tokens[written], expected.tokens[written])
    jax.clear_caches()


# ----------------------------------------------------------------------- 5, 8: the compiled program


def cache_shapes(state: PyTree) -> set[tuple[int, ...]]:
    """The shapes of all key/value buffers in a state."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Cache))
    found = [x for x in nodes if isinstance(x, Cache)]
    return {x.shape for cache in found for x in (*cache.keys, *cache.values)}


def state_shapes(decoder: Decoder, batch: Batch, max_length: int) -> PyTree:
    def init(rng_keys: Array, sampling: Sampling, first: Array, limit: Array) -> PyTree:
        return decoder.init(rng_keys, sampling, first, limit, max_length)

    return jax.eval_shape(init, batch.rng_keys, batch.sampling, batch.prompt[:, 0], batch.limit)


def test_loops_touch_no_whole_cache(program: Program) -> None:
    """Law 5, on the very program that the other laws run."""
    shapes = cache_shapes(state_shapes(program.decoder, scenario(), SLOTS))
    assert testing.whole_buffer_ops(program.text, shapes) == Counter()


def realistic(hidden_size: int, num_kv_heads: int, head_dim: int) -> Model:
    """Caches of a size at which copying them would hurt, and which nothing else has."""
    return transformer(
        TransformerConfig(
            vocab_size=64,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
    )


def cache_ops(build: grow.Builder | None, verifier: Verifier, function: Any) -> Counter[str]:
    """What a decoder's loops do to caches of 256 slots."""
    rows, slots = 2, 256
    big, small = realistic(32, 2, 16), realistic(16, 1, 24)
    drafter = none() if build is None else model(small, build)
    decoder = engine.decoder(big, drafter, verifier, eos_ids=(1,))
    params = Params(*(jax.eval_shape(x.init, jax.random.key(0)) for x in (big, small)))
    batch = Batch(
        jax.random.split(jax.random.key(0), rows),
        sampling(rows, 1.0),
        np.ones((rows, 100), np.int32),
        np.full(rows, 100, np.int32),
        np.full(rows, 200, np.int32),
    )
    shapes = cache_shapes(state_shapes(decoder, batch, slots))
    assert shapes == {(rows, 2, slots, 16)} | ({(rows, 1, slots, 24)} if build else set())
    text = function.lower(decoder, params, *batch, slots).compile().as_text()
    jax.clear_caches()
    return testing.whole_buffer_ops(text, shapes)


@pytest.mark.parametrize(
    ("build", "verifier"),
    [
        pytest.param(None, match, marks=pytest.mark.slow),
        pytest.param(grow.chain(4, grow.coupled()), match, marks=pytest.mark.slow),
        (grow.static(TREE, grow.without_replacement()), rejection),
    ],
    ids=["none/match", "model chain/match", "model tree/rejection"],
)
def test_loops_touch_no_realistic_cache(
    build: grow.Builder | None, verifier: Callable[[], Verifier]
) -> None:
    """Both loops: a decoder's program begins with its prefill."""
    assert cache_ops(build, verifier(), engine.decode) == Counter()


@pytest.mark.slow
def test_loops_touch_no_cache_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    build = grow.static(TREE, grow.without_replacement())
    assert cache_ops(build, rejection(), engine.decode) == Counter()


def test_an_untied_write_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `cache.tie` exists where no kernel writes, and proof that the search finds copies."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(caches, "tie", lambda count, features: count)
    assert cache_ops(None, match(), engine.prefill)["copy"] > 0


def test_one_trace_serves_all_requests(program: Program) -> None:
    """Law 8: other prompts, keys, limits, sampling and weights trace and compile nothing."""
    first = program.result
    traces, programs = program.num_traces, engine.decode._cache_size()
    rng_keys = jax.random.split(jax.random.key(9), ROWS)
    rng = np.random.default_rng(9)
    other = Batch(
        rng_keys,
        sampling(ROWS, rng.random(ROWS), top_k=3, top_p=0.5, min_p=0.2),
        rng.integers(0, VOCAB_SIZE, (ROWS, WIDTH)).astype(np.int32),
        rng.integers(1, WIDTH + 1, ROWS).astype(np.int32),
        rng.integers(1, SLOTS, ROWS).astype(np.int32),
    )
    other_weights = jax.tree.map(lambda x: (x * 1.1).astype(x.dtype), program.params)
    params = jax.block_until_ready(other_weights)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = program.decode(other, params)
        assert compiled == []
        jax.jit(lambda x: x + 1)(1)  # the listener does hear of compilations
        assert compiled != []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert (program.num_traces, engine.decode._cache_size()) == (traces, programs)
    assert traces > 0
    assert not np.array_equal(first.tokens, second.tokens)


# -------------------------------------------------------------------------------- 6: forced history

REPRESENTATIVE = {case.kind: name for name, case in DEFAULTS.items()}  # the last of every kind


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_forcing_a_prompt_equals_forcing_its_tokens(kind: str) -> None:
    """Law 6, down to the drafter's beliefs."""
    case = CASES[REPRESENTATIVE[kind]]
    decoder = engine.decoder(target()[0], case.drafter(), case.verifier())
    params = Params(target()[1], case.params())
    batch, rows = scenario(), np.flatnonzero(scenario().limit == SLOTS + 9)
    ends = [rows[batch.prompt_length[rows] == length][0] for length in (1, WIDTH)]
    batch = batch.take(np.unique([*ends, *rows[:14]]))
    force = jax.jit(decoder.force)

    def start() -> DecodeState:
        return decoder.init(batch.rng_keys, batch.sampling, batch.prompt[:, 0], batch.limit, SLOTS)

    together = force(params, start(), batch.prompt[:, 1:], batch.prompt_length - 1)
    one_by_one = start()
    for i in range(1, WIDTH):
        more = (i < batch.prompt_length).astype(np.int32)
        one_by_one = force(params, one_by_one, batch.prompt[:, i : i + 1], more)
    np.testing.assert_array_equal(together.context.length, batch.prompt_length)
    np.testing.assert_array_equal(together.context.cache.length, batch.prompt_length - 1)
    for x, y in zip(*map(known, (together, one_by_one)), strict=True):
        assert x.dtype == y.dtype
        if np.issubdtype(x.dtype, np.floating):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(x, y)


def known(state: DecodeState) -> list[np.ndarray]:
    """Every array of a state, without randomness and with zeros for garbage."""

    def clean(node: Any) -> Any:
        if not isinstance(node, Cache):
            return node
        keys, values = ([history(x, node.length, 2) for x in xs] for xs in (node.keys, node.values))
        return keys, values, node.length

    context = state.context
    tokens = history(context.tokens, context.length, 1)
    tree = state.replace(context=context.replace(tokens=tokens), rng_keys=())
    cleaned = jax.tree.map(clean, tree, is_leaf=lambda x: isinstance(x, Cache))
    return [np.asarray(x) for x in jax.tree.leaves(cleaned)]


# ------------------------------------------------------------------------------------- 7, 10: forms


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_state_shapes_do_not_depend_on_the_tree(kind: str) -> None:
    """Law 7: a scheduler may switch trees between steps."""
    drafters = [case.drafter() for case in DEFAULTS.values() if case.kind == kind]
    shapes = [jax.eval_shape(lambda d=d: d.init(3, SLOTS)) for d in drafters]
    assert all(shape == shapes[0] for shape in shapes)


def test_kinds_have_several_trees() -> None:
    trees = {case.drafter().proposal for case in DEFAULTS.values() if case.kind == "model"}
    assert len(trees) > 3


def test_quick_cases_have_every_kind_and_every_verifier_of_a_law() -> None:
    """A drafter stands for its law with all verifiers that declare it."""
    quick = [name for name in CASES if name not in SLOW]
    assert {CASES[name].kind for name in quick} == set(REPRESENTATIVE)
    assert set(OF_LAW) == set(LAWS)
    for law, drafter in OF_LAW.items():
        declaring = {rule.__name__ for rule in VERIFIERS if law in rule().laws}
        assert {f"{drafter}/{rule}" for rule in declaring} <= set(quick), law


def test_verifiers_are_all_there_are() -> None:
    files = {path.stem for path in Path(verifiers.__file__).parent.glob("*.py")}
    assert files - {"__init__", "descent"} == {rule.__name__ for rule in VERIFIERS}


def test_drafters_are_all_there_are() -> None:
    """No drafter is exempt."""
    files = {path.stem for path in Path(drafters.__file__).parent.glob("*.py")}
    shared = {"__init__", "adaptive", "corpus", "grow", "self_speculation", "trie"}
    assert files - shared <= {kind.split()[0] for kind in REPRESENTATIVE}


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", DEFAULTS)
def test_protocol(name: str) -> None:
    """Law 10."""
    case = CASES[name]
    drafter, verifier = case.drafter(), case.verifier()
    assert names(drafter.init) == ["batch_size", "max_length"]
    assert names(drafter.propose) == ["params", "rng_keys", "state", "context"]
    assert names(drafter.observe) == ["params", "state", "context", "outcome"]
    assert names(verifier.verify) == [
        "params",
        "rng_keys",
        "context",
        "draft",
        "output",
        "warped",
    ]


def test_shapes_are_those_promised(program: Program) -> None:
    """By a proposal, and the row first everywhere. (That a step changes none its loop demands.)"""
    assert len(program.result.length) == ROWS
    state, info = program.shapes
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {ROWS}, "arrays lead with the row"
    draft, proposal = JUDGED[drafter_of(program.name)], program.parts.drafter.proposal
    law, n, depth = proposal
    assert (draft.tokens.shape, draft.tokens.dtype) == ((ROWS, n), jnp.int32)
    assert (draft.parents.shape, draft.parents.dtype) == ((ROWS, n), jnp.int32)
    assert (draft.num_drafted.shape, draft.depth) == ((ROWS,), depth)
    assert (draft.probs is None) == (law == "point")
    if draft.probs is not None:
        assert (draft.probs.shape, draft.probs.dtype) == ((ROWS, n, VOCAB_SIZE), jnp.float32)
    assert info.tokens.shape == (ROWS, depth + 1)
    assert info.warped_logits.shape == (ROWS, depth + 1, VOCAB_SIZE)
