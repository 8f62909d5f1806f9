"""The laws that every drafter and every verifier keeps, each tested on every row of `cases.CASES`.

Compiling takes most of the time, hence one program per case: one batch shape serves all laws.
"""

import functools
import inspect
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, EOS_ID, TREE, VOCAB_SIZE, draft_model, independent_model, target

from specjax import cache as caches
from specjax import engine, testing
from specjax.drafters import grow
from specjax.drafters.model import model
from specjax.drafters.none import none
from specjax.kernels import native
from specjax.models.transformer import TransformerConfig, transformer
from specjax.sampling import categorical, sampling
from specjax.types import (
    Array,
    Cache,
    Context,
    Decoder,
    DecodeState,
    Draft,
    Drafter,
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

ROWS, WIDTH, SLOTS = 1024, 8, 20  # of every batch: rows, widest prompt, buffer

# ----------------------------------------------------------------------------------------- programs


class Batch(NamedTuple):
    """What a program reads; every array leads with the row."""

    rng_keys: Array
    sampling: Sampling
    prompt: np.ndarray
    prompt_length: np.ndarray
    limit: np.ndarray

    def take(self, rows: np.ndarray) -> "Batch":
        return jax.tree.map(lambda x: x[rows], self)


class Result(NamedTuple):
    """What it leaves behind, as numpy."""

    tokens: np.ndarray  # [B, S]
    length: np.ndarray  # [B]
    done: np.ndarray  # [B]
    num_steps: np.ndarray  # [B]
    cached: np.ndarray  # [B], the target's cache length

    def row(self, b: int) -> tuple:
        """All that row b's owner can see."""
        return (*self.tokens[b, : self.length[b]].tolist(), "steps", int(self.num_steps[b]))


class Program:
    """A case, compiled."""

    def __init__(
        self,
        name: str,
        drafter: Drafter,
        verifier: Verifier,
        drafter_params: PyTree,
        eos_ids: tuple[int, ...] = (EOS_ID,),
    ) -> None:
        self.name, self.verifier = name, verifier
        self.num_traces = 0
        decoder = engine.decoder(target()[0], drafter, verifier, eos_ids=eos_ids)
        self.decoder = decoder._replace(step=self._counted(decoder))
        self.params = Params(target()[1], drafter_params)

    def _counted(self, decoder: Decoder) -> Any:
        def step(params: Params, state: Any) -> Any:
            self.num_traces += 1
            return decoder.step(params, state)

        return step

    def decode(self, batch: Batch, params: Params | None = None) -> Result:
        state = engine.decode(
            self.decoder, self.params if params is None else params, *batch, SLOTS
        )
        context = state.context
        return Result(
            *map(
                np.asarray,
                (context.tokens, context.length, state.done, state.num_steps, context.cache.length),
            )
        )

    @functools.cached_property
    def result(self) -> Result:
        """Of the scenario."""
        return self.decode(scenario())

    @functools.cached_property
    def text(self) -> str:
        """The compiled program, the very one that `decode` runs."""
        batch = scenario()
        lowered = engine.decode.lower(self.decoder, self.params, *batch, SLOTS)
        return lowered.compile().as_text()


@pytest.fixture(
    scope="module", params=[pytest.param(x, marks=pytest.mark.xdist_group(x)) for x in CASES]
)
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    case = CASES[request.param]
    yield Program(request.param, case.drafter(), case.verifier(), case.params())
    jax.clear_caches()


@functools.cache
def scenario() -> Batch:
    """Everything at once: short and long prompts, greedy and sampled rows, all kinds of ends."""
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, VOCAB_SIZE, (ROWS, WIDTH)).astype(np.int32)
    prompt[::2] = np.tile(prompt[::2, :2], 4)  # repetitive, for drafters that copy
    prompt_length = rng.integers(1, WIDTH + 1, ROWS).astype(np.int32)
    limits = np.stack(
        [
            np.ones(ROWS),  # below the prompt
            prompt_length,
            prompt_length + 1,
            prompt_length + rng.integers(2, 9, ROWS),
            np.full(ROWS, SLOTS),
            np.full(ROWS, SLOTS + 9),  # the buffer ends first
        ]
    )
    pick = rng.choice(6, ROWS, p=[0.05, 0.05, 0.1, 0.2, 0.2, 0.4])
    return Batch(
        rng_keys=jax.random.split(jax.random.key(3), ROWS),
        sampling=sampling(
            ROWS,
            temperature=rng.choice([0.0, 0.0, 0.6, 1.0, 1.5], ROWS),
            top_k=rng.choice([0, 0, 3, 4], ROWS),
            top_p=rng.choice([1.0, 1.0, 0.9], ROWS),
            min_p=rng.choice([0.0, 0.0, 0.1], ROWS),
        ),
        prompt=prompt,
        prompt_length=prompt_length,
        limit=limits[pick, np.arange(ROWS)].astype(np.int32),
    )


class Plain(NamedTuple):
    """What plain decoding writes for the scenario."""

    tokens: np.ndarray  # [B, S]
    length: np.ndarray  # [B]


@functools.cache
def plain() -> Plain:
    """The scenario without caches, trees or drafts: the argmax loop, or one with shared noise."""
    batch = scenario()
    where = (batch.prompt, batch.prompt_length, SLOTS)
    greedy = testing.greedy_reference(*target(), *where)
    sampled = testing.sample_reference(*target(), batch.rng_keys, batch.sampling, *where)
    is_greedy = np.asarray(batch.sampling.temperature == 0)[:, None]
    tokens = np.where(is_greedy, greedy.tokens, sampled.tokens)
    length = testing.cut(tokens, batch.prompt_length, batch.limit, (EOS_ID,))
    margin = np.where(is_greedy, greedy.margin, sampled.margin)
    margin = np.where(np.arange(SLOTS) < length[:, None], margin, np.inf)
    # Then no two correct programs can disagree, however they round.
    assert margin.min() > 2e-5, f"choose another scenario: margin {margin.min()}"
    return Plain(tokens, length)


def test_scenario_covers_every_kind_of_end() -> None:
    batch, (tokens, length) = scenario(), plain()
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


class Law(NamedTuple):
    """A prompt and how its continuation is sampled."""

    prompt: tuple[int, ...]
    sampling: dict[str, float]


HORIZON = 3
LAWS = (
    Law((1, 2, 3, 1, 2, 0), {"temperature": 0.9, "min_p": 0.05}),
    Law((3, 0, 3), {"temperature": 1.3, "top_k": 4, "top_p": 0.9}),
)
NUM_CALLS = 40
ROWS_PER_LAW = NUM_CALLS * ROWS // len(LAWS)
NUM_TESTS = len(CASES) * len(LAWS)
FAULT = 0.035  # total variation that is found with probability .99, whatever its form


@functools.cache
def exact_laws() -> list[np.ndarray]:
    return [
        testing.exact_law(*target(), law.prompt, sampling(1, **law.sampling), HORIZON, EOS_ID)
        for law in LAWS
    ]


def law_tests(program: Program, num_calls: int = NUM_CALLS) -> list[testing.LawTest]:
    """Decodes three tokens in rows of either law, side by side, and compares."""
    which = np.arange(ROWS) % len(LAWS)
    prompt = np.zeros((ROWS, WIDTH), np.int32)
    prompt_length = np.array([len(law.prompt) for law in LAWS], np.int32)[which]
    for i, law in enumerate(LAWS):
        prompt[which == i, : len(law.prompt)] = law.prompt
    settings = {
        name: np.array([law.sampling.get(name, off) for law in LAWS])[which]
        for name, off in {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}.items()
    }
    seed = zlib.crc32(program.name.encode())
    rng_keys = jax.random.split(jax.random.key(seed), (num_calls, ROWS))
    counts = np.zeros((len(LAWS), VOCAB_SIZE**HORIZON), np.int64)
    for keys in rng_keys:
        batch = Batch(
            keys, sampling(ROWS, **settings), prompt, prompt_length, prompt_length + HORIZON
        )
        result = program.decode(batch)
        for i in range(len(LAWS)):
            rows = which == i
            counts[i] += testing.count_strings(
                result.tokens[rows],
                prompt_length[rows],
                result.length[rows],
                HORIZON,
                VOCAB_SIZE,
                EOS_ID,
            )
    return [
        testing.law_test(count, law, NUM_TESTS)
        for count, law in zip(counts, exact_laws(), strict=True)
    ]


def test_lossless(program: Program) -> None:
    for test in law_tests(program):
        assert test.num_rows == ROWS_PER_LAW
        assert test.passed, f"{program.name}: {test}"


def test_power_of_the_law_tests() -> None:
    for law in exact_laws():
        cells = int((law > 0).sum())
        needed = testing.sample_size(cells, FAULT, NUM_TESTS)
        print(f"{cells} cells: a fault of {FAULT} takes {needed} rows, {ROWS_PER_LAW} are drawn")
        assert needed <= ROWS_PER_LAW


def test_laws_are_uneven_and_truncated() -> None:
    """On laws near uniform, or the draft model's own, every rule would look lossless."""
    for law, p in zip(LAWS, exact_laws(), strict=True):
        uncut = {"temperature": law.sampling["temperature"]}
        plain = testing.exact_law(*target(), law.prompt, sampling(1, **uncut), HORIZON, EOS_ID)
        here = sampling(1, **law.sampling)
        q = testing.exact_law(*draft_model(), law.prompt, here, HORIZON, EOS_ID)
        assert (p > 0).sum() < (plain > 0).sum()
        assert abs(p - 1 / len(p)).sum() / 2 > 0.3
        assert 0.3 < abs(p - q).sum() / 2 < 0.9


# ------------------------------------------------------------------------ faults that must be found


def misreported(choose: grow.Choose) -> grow.Choose:
    """Draws at twice the temperature that it reports."""

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        tokens, _ = choose.draw(rng_keys, context, depth, logits / 2, k)
        return tokens, choose.draw(rng_keys, context, depth, logits, k)[1]

    return grow.Choose(draw, choose.law)


def sorted_siblings(choose: grow.Choose) -> grow.Choose:
    """Re-orders drawn tokens, each with the law that it was drawn from."""

    def draw(
        rng_keys: Keys, context: Context, depth: int, logits: Array, k: int
    ) -> tuple[Array, Array]:
        tokens, probs = choose.draw(rng_keys, context, depth, logits, k)
        order = jnp.argsort(tokens, -1)
        return (
            jnp.take_along_axis(tokens, order, -1),
            jnp.take_along_axis(probs, order[..., None], 2),
        )

    return grow.Choose(draw, choose.law)


def without_residual() -> Verifier:
    """After a rejection draws from p instead of what is left of it."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        verdict = rejection().verify(params, rng_keys, context, draft, output, warped)
        last = jnp.take_along_axis(verdict.path, verdict.num_nodes[:, None] - 1, 1)
        p = jnp.take_along_axis(warped, last[..., None], 1)[:, 0]
        return verdict.replace(next_token=categorical(rng_keys, context, "fault", p))

    return Verifier(verify, ("chain",))


def residual_of_the_next_node() -> Verifier:
    """Looks up the target's law one node too late, as an off-by-one would."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        late = warped.at[:, 1:-1].set(warped[:, 2:])
        return rejection().verify(params, rng_keys, context, draft, output, late)

    return Verifier(verify, ("chain",))


def reused_draws() -> Verifier:
    """Forgets where it is: every step of a row sees the same private randomness."""

    def verify(
        params: Params,
        rng_keys: Keys,
        context: Context,
        draft: Draft,
        output: ModelOutput,
        warped: Array,
    ) -> Verdict:
        nowhere = context.replace(length=jnp.ones_like(context.length))
        return rejection().verify(params, rng_keys, nowhere, draft, output, warped)

    return Verifier(verify, ("chain",))


FAULTS = {
    "misreported probs": (grow.chain(1, misreported(grow.without_replacement())), rejection),
    "sorted siblings": (
        grow.static((-1, 0, 0, 0), sorted_siblings(grow.without_replacement())),
        rejection,
    ),
    "no residual": (grow.chain(1, grow.without_replacement()), without_residual),
    "off by one": (grow.chain(2, grow.without_replacement()), residual_of_the_next_node),
    "reused draws": (grow.chain(1, grow.without_replacement()), reused_draws),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    build, verifier = FAULTS[name]
    faulty = Program(name, independent_model(build)(), verifier(), draft_model()[1])
    assert not all(test.passed for test in law_tests(faulty))
    jax.clear_caches()


# -------------------------------------------------------------- 2, 3, 4: text determined by the row


def test_text_equals_plain_decoding(program: Program) -> None:
    """Laws 2 and 3: greedy rows always, and under `match` sampled rows too, whatever the draft."""
    batch, expected, result = scenario(), plain(), program.result
    determined = np.asarray(batch.sampling.temperature) == 0
    if program.name.endswith("/match"):
        determined[:] = True
    assert determined.sum() > ROWS // 4
    np.testing.assert_array_equal(result.length[determined], expected.length[determined])
    written = (np.arange(SLOTS) < expected.length[:, None]) & determined[:, None]
    np.testing.assert_array_equal(result.tokens[written], expected.tokens[written])


def test_every_row_ends_where_it_should(program: Program) -> None:
    batch, result = scenario(), program.result
    at = np.arange(SLOTS)
    prompt = at[:WIDTH] < batch.prompt_length[:, None]
    np.testing.assert_array_equal(result.tokens[:, :WIDTH][prompt], batch.prompt[prompt])
    assert result.done.all()
    new = (at >= batch.prompt_length[:, None]) & (at < result.length[:, None])
    is_eos = (result.tokens == EOS_ID) & new
    assert not is_eos[at < result.length[:, None] - 1].any(), "text goes on after an EOS"
    end = np.maximum(np.minimum(batch.limit, SLOTS), batch.prompt_length)
    np.testing.assert_array_equal(np.where(is_eos.any(1), end, result.length), end)
    assert (result.length <= end).all()
    np.testing.assert_array_equal(result.cached, result.length - 1)


def test_steps_are_counted_and_drafts_accepted(program: Program) -> None:
    batch, result = scenario(), program.result
    gained = result.length - batch.prompt_length
    depth = program.decoder.proposal.depth
    assert ((result.num_steps == 0) == (gained == 0)).all()
    assert (result.num_steps <= gained).all()
    assert (gained <= result.num_steps * (depth + 1)).all()
    # Laws about acceptance say nothing if nothing is accepted.
    assert gained.sum() > (1 if depth == 0 else 1.1) * result.num_steps.sum() - (depth == 0)


def test_rows_are_independent(program: Program) -> None:
    """Law 4: neither a row's place nor its neighbours' prompts, limits and sampling matter."""
    batch, alone = scenario(), program.result
    rng = np.random.default_rng(zlib.crc32(program.name.encode()))

    def check(rows: np.ndarray, others: Batch) -> None:
        """Puts `rows` of the scenario at random places among `others`."""
        place = rng.permutation(ROWS)[: len(rows)]
        source = np.arange(ROWS)
        source[place] = ROWS + rows
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), others, batch)
        mixed = program.decode(both.take(source))
        for row, at in zip(rows, place, strict=True):
            assert mixed.row(at) == alone.row(row), f"row {row} of the scenario at {at}"

    fresh = jax.random.split(jax.random.key(4), ROWS)
    shuffled = batch.take(rng.permutation(ROWS))
    check(np.arange(0, ROWS, 2), shuffled._replace(rng_keys=fresh))
    uncut = np.asarray(
        (batch.sampling.top_k == 0) & (batch.sampling.top_p == 1) & (batch.sampling.min_p == 0)
    )
    greedy = shuffled._replace(sampling=sampling(ROWS))
    check(np.flatnonzero(uncut)[:100], greedy)
    # A row by itself: all others are at their limit from the start.
    idle = shuffled._replace(limit=np.ones(ROWS, np.int32))
    longest = np.argsort(-alone.num_steps, kind="stable")
    sampled = np.asarray(batch.sampling.temperature)[longest] > 0
    check(longest[sampled][:1], idle)
    check(longest[~sampled][:1], idle)


@pytest.mark.parametrize("name", ["lookup/rejection", "model tree without_replacement/rejection"])
def test_eos_only_cuts(name: str) -> None:
    """Where private draws decide, the text up to an EOS is that of a decoder which knows no EOS."""
    case = CASES[name]
    cutting, endless = (
        Program(name, case.drafter(), case.verifier(), case.params(), eos_ids)
        for eos_ids in ((EOS_ID,), ())
    )
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
        (None, match),
        (grow.chain(4, grow.coupled()), match),
        (grow.static(TREE, grow.without_replacement()), rejection),
    ],
    ids=["none/match", "model chain/match", "model tree/rejection"],
)
def test_loops_touch_no_realistic_cache(
    build: grow.Builder | None, verifier: Callable[[], Verifier]
) -> None:
    """Both loops: a decoder's program begins with its prefill."""
    assert cache_ops(build, verifier(), engine.decode) == Counter()


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
    params = jax.block_until_ready(jax.tree.map(lambda x: x * 1.1, program.params))
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

REPRESENTATIVE = {case.kind: name for name, case in CASES.items()}  # the last of every kind


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_forcing_a_prompt_equals_forcing_its_tokens(kind: str) -> None:
    """Law 6, down to the drafter's beliefs."""
    case = CASES[REPRESENTATIVE[kind]]
    decoder = engine.decoder(target()[0], case.drafter(), case.verifier())
    params = Params(target()[1], case.params())
    batch = scenario().take(np.flatnonzero(scenario().limit == SLOTS + 9)[:16])
    assert {1, WIDTH} <= set(batch.prompt_length.tolist())
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

    def history(x: Array, length: Array, axis: int) -> Array:
        keep = jnp.arange(x.shape[axis]) < length[:, None]
        return jnp.where(
            keep.reshape(keep.shape[0], *[1] * (axis - 1), -1, *[1] * (x.ndim - axis - 1)), x, 0
        )

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
    drafters = [case.drafter() for case in CASES.values() if case.kind == kind]
    shapes = [jax.eval_shape(lambda d=d: d.init(3, SLOTS)) for d in drafters]
    assert all(shape == shapes[0] for shape in shapes)


def test_kinds_have_several_trees() -> None:
    trees = {case.drafter().proposal for case in CASES.values() if case.kind == "model"}
    assert len(trees) > 3


def names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", CASES)
def test_protocol(name: str) -> None:
    """Law 10, and the shapes that a proposal promises."""
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
    rows = 3
    decoder = engine.decoder(target()[0], drafter, verifier)
    params = Params(target()[1], case.params())
    state = state_shapes(decoder, scenario().take(np.arange(rows)), SLOTS)
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {rows}, "arrays lead with the row"
    draft, _ = jax.eval_shape(drafter.propose, params, state.rng_keys, state.drafter, state.context)
    law, n, depth = drafter.proposal
    assert (draft.tokens.shape, draft.tokens.dtype) == ((rows, n), jnp.int32)
    assert (draft.parents.shape, draft.parents.dtype) == ((rows, n), jnp.int32)
    assert (draft.num_drafted.shape, draft.depth) == ((rows,), depth)
    assert (draft.probs is None) == (law == "point")
    if draft.probs is not None:
        assert (draft.probs.shape, draft.probs.dtype) == ((rows, n, VOCAB_SIZE), jnp.float32)
    after, info = jax.eval_shape(decoder.step, params, state)
    assert after == state, "a step changes no shape"
    assert info.tokens.shape == (rows, depth + 1)
    assert info.warped_logits.shape == (rows, depth + 1, VOCAB_SIZE)
