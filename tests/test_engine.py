"""The engine by itself: what a step reports, how rows end and go on, what is refused when built."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, EOS_ID, VOCAB_SIZE, draft_model, target

from specjax import cache as caches
from specjax import engine, testing, trees
from specjax.drafters import grow
from specjax.drafters.lookup import lookup
from specjax.drafters.model import model
from specjax.drafters.none import none
from specjax.models.transformer import forward
from specjax.sampling import sampling, warp
from specjax.types import (
    Array,
    Context,
    DecodeState,
    Draft,
    Drafter,
    Keys,
    Outcome,
    Params,
    Proposal,
    Sampling,
    Verifier,
)
from specjax.verifiers.match import match
from specjax.verifiers.rejection import rejection

WIDTH, SLOTS = 8, 24


class Requests(NamedTuple):
    """A batch; the fields are `engine.decode`'s."""

    rng_keys: Array
    sampling: Sampling
    prompt: np.ndarray
    prompt_length: np.ndarray
    limit: np.ndarray


def requests(rows: int, temperature: Any = 0.0, seed: int = 0, limit: int = SLOTS) -> Requests:
    rng = np.random.default_rng(seed)
    return Requests(
        jax.random.split(jax.random.key(seed), rows),
        sampling(rows, temperature),
        rng.integers(0, VOCAB_SIZE, (rows, WIDTH)).astype(np.int32),
        rng.integers(1, WIDTH + 1, rows).astype(np.int32),
        np.full(rows, limit, np.int32),
    )


def texts(state: DecodeState) -> list[list[int]]:
    context = state.context
    rows = zip(np.asarray(context.tokens), np.asarray(context.length), strict=True)
    return [row[:n].tolist() for row, n in rows]


# ---------------------------------------------------------------------------- a draft that is known


def scripted(num_tokens: int) -> Drafter:
    """Proposes what `params.drafter` [B, S] says comes next."""

    def init(batch_size: int, max_length: int) -> tuple:
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        at = context.length[:, None] + jnp.arange(num_tokens)
        at = jnp.minimum(at, context.tokens.shape[1] - 1)
        guess = jnp.take_along_axis(params.drafter, at, 1)
        return trees.chain(jnp.concatenate([trees.root(context), guess], 1)), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        return state

    return Drafter(init, propose, observe, Proposal("point", num_tokens + 1, num_tokens))


@functools.cache
def scripted_decoder(num_tokens: int, eos_ids: tuple[int, ...]) -> Any:
    return engine.decoder(target()[0], scripted(num_tokens), match(), eos_ids=eos_ids)


@pytest.mark.parametrize("eos_ids", [(), (EOS_ID, 1)], ids=["endless", "two"])
def test_every_place_of_an_end_within_a_step(eos_ids: tuple[int, ...]) -> None:
    """A perfect draft gains D + 1 tokens a step, up to an EOS, a limit or the buffer's end."""
    rows, num_tokens = 96, 3
    batch = requests(rows)
    rng = np.random.default_rng(1)
    limit = np.where(rng.random(rows) < 0.5, SLOTS + 5, rng.integers(1, SLOTS, rows))
    batch = batch._replace(limit=limit.astype(np.int32))
    reference = testing.greedy_reference(*target(), batch.prompt, batch.prompt_length, SLOTS)
    assert reference.margin.min() > 2e-5
    length = testing.cut(reference.tokens, batch.prompt_length, limit, eos_ids)
    new = length - batch.prompt_length
    decoder = scripted_decoder(num_tokens, eos_ids)
    for script, steps in (
        (reference.tokens, -(-new // (num_tokens + 1))),
        ((reference.tokens + 1) % VOCAB_SIZE, new),  # always wrong: one token a step
    ):
        params = Params(target()[1], jnp.asarray(script))
        state = engine.decode(decoder, params, *batch, SLOTS)
        expected = [x[:n].tolist() for x, n in zip(reference.tokens, length, strict=True)]
        assert texts(state) == expected
        np.testing.assert_array_equal(state.num_steps, steps)
        np.testing.assert_array_equal(state.context.cache.length, length - 1)
        assert state.done.all()
    last = reference.tokens[np.arange(rows), length - 1]
    by_eos = np.isin(last, eos_ids) & (new > 0)
    for kind, places in (
        (by_eos, range(num_tokens + 1) if eos_ids else ()),
        (~by_eos & (length == limit) & (new > 0), range(num_tokens + 1)),
        (~by_eos & (length == SLOTS) & (limit > SLOTS), range(num_tokens + 1)),
    ):
        assert set((new[kind] - 1) % (num_tokens + 1)) == set(places), "choose another seed"


# ------------------------------------------------------------------------------------- single steps


@pytest.mark.parametrize(
    "name",
    [
        "lookup/match",
        pytest.param("model tree without_replacement/rejection", marks=pytest.mark.slow),
    ],
)
def test_a_step_reports_what_it_did(name: str) -> None:
    rows, slots = 8, 18
    case = CASES[name]
    drafter = case.drafter()
    decoder = engine.decoder(target()[0], drafter, case.verifier(), eos_ids=(EOS_ID,))
    params = Params(target()[1], case.params())
    batch = requests(rows, [0.0, 1.0] * (rows // 2), seed=2)
    batch = batch._replace(limit=np.array([30, 30, 30, 14, 12, 30, 30, 1], np.int32))
    state = engine.prefill(decoder, params, *batch, slots)
    step = jax.jit(decoder.step)
    uncached = jax.jit(lambda tokens: forward(target()[0], target()[1], tokens).logits)
    end = np.minimum(batch.limit, slots)
    most, gains = drafter.proposal.num_nodes - 1, set()
    while not state.done.all():
        before, (state, info) = state, step(params, state)
        old, new = before.context, state.context
        was_done = np.asarray(before.done)
        assert_rows_equal(before, state, was_done)
        count = np.asarray(info.num_tokens)
        assert (count[was_done] == 0).all()
        assert (count[~was_done] >= 1).all()
        assert (np.asarray(info.num_drafted)[was_done] == 0).all()
        drafted = set(np.asarray(info.num_drafted)[~was_done].tolist())
        assert drafted <= ({0, most} if case.kind == "lookup" else {most})
        np.testing.assert_array_equal(new.length, old.length + count)
        np.testing.assert_array_equal(new.cache.length, new.length - 1)
        np.testing.assert_array_equal(state.num_steps, before.num_steps + ~was_done)
        np.testing.assert_array_equal(
            info.warped_logits, jax.jit(warp)(info.logits, batch.sampling)
        )
        logits = np.asarray(uncached(new.tokens))
        for b in range(rows):
            start, n = int(old.length[b]), int(count[b])
            gains.add(n)
            np.testing.assert_array_equal(new.tokens[b, :start], old.tokens[b, :start])
            written = new.tokens[b, start : start + n]
            np.testing.assert_array_equal(info.tokens[b, :n], written)
            judged = logits[b, start - 1 : start - 1 + n]
            np.testing.assert_allclose(info.logits[b, :n], judged, atol=1e-4)
            if batch.sampling.temperature[b] == 0:
                np.testing.assert_array_equal(written, judged.argmax(-1))
            is_eos = np.asarray(written) == EOS_ID
            assert not is_eos[:-1].any()
            ended = is_eos[-1:].any() or start + n >= end[b]
            assert bool(state.done[b]) == bool(was_done[b] or ended)
    assert len(gains) > 2, "some drafts are accepted, others are not"
    assert_rows_equal(state, step(params, state)[0], np.ones(rows, bool))


def assert_rows_equal(before: DecodeState, after: DecodeState, rows: np.ndarray) -> None:
    """The given rows are the same to the bit: caches, beliefs, keys and garbage included."""

    def plain(x: Array) -> np.ndarray:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)[rows]

    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(plain(x), plain(y))


# --------------------------------------------------------------------------------- other ways round


def test_advancing_in_pieces_equals_decoding() -> None:
    decoder = engine.decoder(target()[0], lookup(3), rejection(), eos_ids=(EOS_ID,))
    params = Params(target()[1])
    batch = requests(8, [0.0, 1.0, 1.0, 1.5] * 2, seed=3)
    whole = engine.decode(decoder, params, *batch, SLOTS)
    state = engine.prefill(decoder, params, *batch, SLOTS)
    for num_steps in (0, 1, 3, SLOTS):
        before = int(state.num_steps.max())
        state = engine.advance(decoder, params, state, num_steps)
        assert int(state.num_steps.max()) <= before + num_steps
        assert num_steps == SLOTS or not state.done.all()
    assert texts(state) == texts(whole)
    for x, y in ((state.done, whole.done), (state.num_steps, whole.num_steps)):
        np.testing.assert_array_equal(x, y)


def test_text_does_not_depend_on_batch_size_nor_buffers() -> None:
    decoder = engine.decoder(target()[0], none(), match(), eos_ids=(EOS_ID,))
    params = Params(target()[1])
    batch = requests(5, [0.0, 1.0, 1.0, 1.5, 0.7], seed=4, limit=20)
    together = texts(engine.decode(decoder, params, *batch, SLOTS))
    for row in range(1, 5, 2):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        assert texts(engine.decode(decoder, params, *alone, SLOTS)) == [together[row]]
    wide = batch._replace(prompt=np.pad(batch.prompt, ((0, 0), (0, 5)), constant_values=3))
    assert texts(engine.decode(decoder, params, *wide, 2 * SLOTS)) == together


@pytest.mark.slow
def test_a_draft_model_equal_to_the_target_is_always_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything missing or left over in its cache would cost acceptance, though not correctness.

    After prompts in several chunks, and again after history was replaced: a commitment is absolute.
    """
    monkeypatch.setattr(engine, "PROMPT_CHUNK", 3)
    num_tokens = 2
    batch = requests(8, [0.0, 1.0] * 4, seed=5)
    drafter = model(target()[0], grow.chain(num_tokens, grow.coupled()))
    decoder = engine.decoder(target()[0], drafter, match())
    params = Params(target()[1], target()[1])
    state = engine.prefill(decoder, params, *batch, SLOTS)
    state = engine.advance(decoder, params, state, SLOTS)
    np.testing.assert_array_equal(state.context.length, SLOTS)
    steps = -(-(SLOTS - batch.prompt_length) // (num_tokens + 1))
    np.testing.assert_array_equal(state.num_steps, steps)

    back = batch.prompt_length + 2
    others = np.asarray(state.context.tokens)[np.arange(8)[:, None], back[:, None] + [0, 1]] + 1
    others %= VOCAB_SIZE
    rewound = state.replace(
        context=state.context.replace(
            length=jnp.asarray(back), cache=caches.truncate(state.context.cache, back - 1)
        ),
        num_steps=jnp.zeros(8, jnp.int32),
    )
    state = jax.jit(decoder.force)(params, rewound, others, np.full(8, 2, np.int32))
    state = engine.advance(decoder, params, state, SLOTS)
    np.testing.assert_array_equal(state.context.length, SLOTS)
    np.testing.assert_array_equal(state.num_steps, -(-(SLOTS - back - 2) // (num_tokens + 1)))


def test_prompts_of_any_number_of_chunks() -> None:
    length = np.array([1, 2, 64, 65, 66, 129, 130, 150], np.int32)
    rng = np.random.default_rng(6)
    prompt = rng.integers(0, VOCAB_SIZE, (len(length), 150)).astype(np.int32)
    decoder = engine.decoder(target()[0], none(), match())
    slots = 160
    batch = requests(len(length))._replace(prompt=prompt, prompt_length=length, limit=length + 8)
    state = engine.decode(decoder, Params(target()[1]), *batch, slots)
    reference = testing.greedy_reference(*target(), prompt, length, slots)
    expected = [x[: n + 8].tolist() for x, n in zip(reference.tokens, length, strict=True)]
    assert texts(state) == expected


def test_a_conversation_goes_on_after_its_end() -> None:
    """Forced tokens wake rows that ended; the text is that of one long prompt."""
    decoder = engine.decoder(target()[0], none(), match(), eos_ids=(EOS_ID,))
    params = Params(target()[1])
    batch = requests(12, [0.0, 1.0, 1.3] * 4, seed=7)
    first = engine.decode(decoder, params, *batch, SLOTS)
    length = np.asarray(first.context.length)
    turn = np.random.default_rng(8).integers(0, VOCAB_SIZE, (12, 3)).astype(np.int32)
    num_tokens = np.where(np.arange(12) % 4 == 3, 0, 3).astype(np.int32)
    told = jax.jit(decoder.force)(params, first, turn, num_tokens)
    grown = np.minimum(length + num_tokens, SLOTS)
    np.testing.assert_array_equal(told.context.length, grown)
    np.testing.assert_array_equal(told.context.cache.length, grown - 1)
    wakes = (num_tokens > 0) & (length < SLOTS)
    np.testing.assert_array_equal(told.done, ~wakes | (grown == SLOTS))
    assert {True, False} == set(told.done.tolist())
    assert (wakes & (grown == SLOTS)).any() or (length == SLOTS).any()
    history = np.asarray(told.context.tokens)
    for b in range(12):
        forced = turn[b, : grown[b] - length[b]]
        np.testing.assert_array_equal(history[b, length[b] : grown[b]], forced)
    second = engine.advance(decoder, params, told, SLOTS)
    anew = batch._replace(prompt=history, prompt_length=grown.astype(np.int32))
    again = engine.decode(decoder, params, *anew, SLOTS)
    awake = [b for b in range(12) if wakes[b]]
    assert [texts(second)[b] for b in awake] == [texts(again)[b] for b in awake]
    asleep = [b for b in range(12) if num_tokens[b] == 0]
    assert [texts(second)[b] for b in asleep] == [history[b, : length[b]].tolist() for b in asleep]


# ----------------------------------------------------------------------------------------- refusals


def picky(*laws: str) -> Verifier:
    return match()._replace(laws=laws)


def drafting_with(vocab_size: int) -> Drafter:
    return model(testing.tiny_model(vocab_size)[0], grow.chain(2, grow.best()))


REFUSALS: dict[str, tuple[Any, str]] = {
    "law": (
        lambda: engine.decoder(target()[0], lookup(2), picky("paths", "siblings")),
        "proposes law 'point' but the verifier is lossless for paths, siblings only",
    ),
    "law of a tree": (
        lambda: engine.decoder(
            target()[0],
            model(draft_model()[0], grow.static((-1, 0, 0, 1, 1), grow.independent())),
            picky("general"),
        ),
        "proposes law 'siblings' but the verifier is lossless for general only",
    ),
    "vocabulary": (
        lambda: engine.decoder(target()[0], drafting_with(7), match()),
        "vocabulary has 7 tokens and the target's 5; they must be the same",
    ),
    "EOS beyond": (
        lambda: engine.decoder(target()[0], none(), match(), eos_ids=(1, 5)),
        "EOS id 5 lies outside the 5 tokens",
    ),
    "EOS below": (
        lambda: engine.decoder(target()[0], none(), match(), eos_ids=(-1,)),
        "EOS id -1 lies outside the 5 tokens",
    ),
    "a tree's order": (lambda: grow.static((-1, 1, 0), grow.best()), "Node 1 .* has parent 1"),
    "a lone root": (lambda: grow.static((-1,), grow.best()), "is its root alone"),
    "an empty chain": (lambda: grow.chain(0, grow.best()), "is its root alone"),
    "no tree": (lambda: grow.static((), grow.best()), "must start with its root"),
    "nothing to copy": (lambda: lookup(0), "num_tokens=0.* both must be at least 1"),
    "nothing to compare": (lambda: lookup(2, ngram=0), "ngram=0.* both must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_impossible_things_are_refused_when_built(name: str) -> None:
    build, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("width", [0, 13])
@pytest.mark.parametrize("function", [engine.decode, engine.prefill])
def test_prompts_must_fit_the_buffer(width: int, function: Any) -> None:
    decoder = engine.decoder(target()[0], none(), match())
    batch = requests(2)._replace(prompt=np.zeros((2, width), np.int32))
    with pytest.raises(ValueError, match=f"width {width} need between 1 token and the buffer's 12"):
        function(decoder, Params(target()[1]), *batch, 12)


def test_a_prompt_may_fill_the_buffer() -> None:
    decoder = engine.decoder(target()[0], none(), match())
    batch = requests(2)._replace(prompt_length=np.array([WIDTH, 1], np.int32))
    state = engine.decode(decoder, Params(target()[1]), *batch, WIDTH)
    np.testing.assert_array_equal(state.context.length, [WIDTH, WIDTH])
    np.testing.assert_array_equal(state.num_steps, [0, WIDTH - 1])
    np.testing.assert_array_equal(state.context.tokens[0], batch.prompt[0])


@pytest.mark.parametrize(
    ("build", "law", "num_nodes", "depth"),
    [
        (grow.chain(3, grow.best()), "point", 4, 3),
        (grow.chain(3, grow.coupled()), "coupled", 4, 3),
        (grow.chain(3, grow.without_replacement()), "chain", 4, 3),
        (grow.chain(3, grow.independent()), "chain", 4, 3),
        (grow.static((-1, 0, 0, 1), grow.best()), "point", 4, 2),
        (grow.static((-1, 0, 0, 1), grow.coupled()), "coupled", 4, 2),
        (grow.static((-1, 0, 0, 1), grow.without_replacement()), "general", 4, 2),
        (grow.static((-1, 0, 0, 1), grow.independent()), "siblings", 4, 2),
    ],
)
def test_builders_say_what_they_grow(
    build: grow.Builder, law: str, num_nodes: int, depth: int
) -> None:
    assert build.proposal == Proposal(law, num_nodes, depth)
    decoder = engine.decoder(target()[0], model(draft_model()[0], build), match())
    assert decoder.proposal == build.proposal
    assert decoder.lossless


def test_losslessness_is_handed_on() -> None:
    lossy = match()._replace(lossless=False)
    assert not engine.decoder(target()[0], none(), lossy).lossless


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 64), (64, 64), (65, 128), (128, 128), (1000, 1024)]
)
def test_bucket(length: int, expected: int) -> None:
    assert engine.bucket(length) == expected
