"""What a decoder must keep to whatever it drafts, in one program: a large ragged batch of rows.

Every row has its own prompt, limit, temperature and truncation. Plain decoding without caches,
trees and drafts says what greedy rows write, and under a drafter-invariant rule the others too;
exact enumeration of the target says how often each text is written.
"""

import copy
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specjax import engine, testing
from specjax.enumeration import history
from specjax.interruption import MOST, RECOVERY, InterruptedState, Interruptible, interruptible
from specjax.laboratory import Check, Factory, Parts, build_decoder, checked, transformer_pair
from specjax.models.transformer import forward
from specjax.sampling import sampling
from specjax.types import (
    Array,
    Cache,
    Decoder,
    DecodeState,
    Model,
    Params,
    PyTree,
    Sampling,
    StepInfo,
    Verifier,
)

# ------------------------------------------------------------------------------- one large batch

ROWS, SLOTS = 512, 20  # of every batch: rows, buffer
WIDTH = 8  # the longest prompt
EOS_ID = 4


class Batch(NamedTuple):
    """What a program reads; every array leads with the row."""

    rng_keys: Array
    sampling: Sampling
    prompt: np.ndarray  # [B, T]
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
    caches: list[Cache]  # the target's, then the drafter's
    interrupted: InterruptedState  # without the drafter's own

    def row(self, b: int) -> tuple:
        """All that row b's owner can see."""
        return (*self.tokens[b, : self.length[b]].tolist(), "steps", int(self.num_steps[b]))


class Program:
    """A decoder of the laboratory's transformers, compiled for one shape of batch."""

    def __init__(self, name: str, factory: Factory, eos_ids: tuple[int, ...] = (EOS_ID,)) -> None:
        self.name, self.pair = name, transformer_pair()
        self.parts = factory(self.pair)
        # One program with foreign drafts and without.
        drafter, weights, verifier = self.parts
        parts = Parts(interruptible(drafter), Interruptible(weights, jnp.int32(0)), verifier)
        decoder, self.params = build_decoder(lambda _: parts, self.pair, eos_ids)
        self._traced: list[Any] = []
        self.decoder: Decoder = decoder._replace(step=self._counted(decoder))

    def _counted(self, decoder: Decoder) -> Callable:
        def step(params: Params, state: DecodeState) -> Any:
            after, info = decoder.step(params, state)
            self._traced.append(jax.tree.map(jax.typeof, (after, info)))
            return after, info

        return step

    @property
    def num_traces(self) -> int:
        """How often its step was traced."""
        return len(self._traced)

    @property
    def shapes(self) -> tuple[DecodeState, StepInfo]:
        """Of what a step returns, once it was traced."""
        shapes: tuple[DecodeState, StepInfo] = self._traced[-1]
        return shapes

    def judged_by(self, name: str, which: int, verifier: Verifier) -> "Program":
        """The same compiled program with `which` for the verifier's weights.

        Args:
            name: of the new case.
            which: of several verifiers, among which this program's chooses by `params.verifier`.
            verifier: that one, for what it promises.
        """
        other = copy.copy(self)
        other.__dict__.pop("result", None)
        other.name = name
        other.parts = self.parts._replace(verifier=verifier)
        other.params = self.params._replace(verifier=jnp.int32(which))
        return other

    def decode(self, batch: Batch, params: Params | None = None) -> Result:
        params = self.params if params is None else params
        state = engine.decode(self.decoder, params, *batch, SLOTS)
        return _result(state)

    @functools.cached_property
    def result(self) -> Result:
        """Of the scenario."""
        return self.decode(scenario(self.pair.target.vocab_size))

    @functools.cached_property
    def text(self) -> str | None:
        """The compiled program, the very one that `decode` runs."""
        batch = scenario(self.pair.target.vocab_size)
        return engine.decode.lower(self.decoder, self.params, *batch, SLOTS).compile().as_text()


def _result(state: DecodeState) -> Result:
    context = state.context
    nodes = jax.tree.leaves((context.cache, state.drafter), is_leaf=lambda x: isinstance(x, Cache))
    caches = [jax.tree.map(np.asarray, x) for x in nodes if isinstance(x, Cache)]
    return Result(
        np.asarray(context.tokens),
        np.asarray(context.length),
        np.asarray(state.done),
        np.asarray(state.num_steps),
        caches,
        jax.tree.map(np.asarray, state.drafter.replace(own=())),
    )


@functools.cache
def scenario(vocab_size: int) -> Batch:
    """Everything at once: short and long prompts, greedy and sampled rows, all kinds of ends."""
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, vocab_size, (ROWS, WIDTH)).astype(np.int32)
    prompt[::2] = np.tile(prompt[::2, :2], WIDTH // 2)  # repetitive, for drafters that copy
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
    target, params = transformer_pair()[:2]
    batch = scenario(target.vocab_size)
    where = (batch.prompt, batch.prompt_length, SLOTS)
    greedy = testing.greedy_reference(target, params, *where)
    sampled = testing.sample_reference(target, params, batch.rng_keys, batch.sampling, *where)
    is_greedy = np.asarray(batch.sampling.temperature == 0)[:, None]
    tokens = np.where(is_greedy, greedy.tokens, sampled.tokens)
    length = testing.cut(tokens, batch.prompt_length, batch.limit, (EOS_ID,))
    margin = np.where(is_greedy, greedy.margin, sampled.margin)
    margin = np.where(np.arange(SLOTS) < length[:, None], margin, np.inf)
    # Then no two correct programs can disagree, however they round.
    if margin.min() < 2e-5:
        raise RuntimeError(f"The scenario leaves a margin of {margin.min()}; choose another.")
    return Plain(tokens, length)


# ------------------------------------------------------------------------------ sampled by the law


class Law(NamedTuple):
    """A prompt and how its continuation is sampled."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]


HORIZON = 3
LAWS = (
    Law((1, 2, 3, 1, 2, 0), {"temperature": 0.9, "min_p": 0.05}),
    Law((3, 0, 3), {"temperature": 1.3, "top_k": 4, "top_p": 0.9}),
)
FAULT, DETECTION = 0.02, 0.99  # total variation that is found, and with which probability


@functools.cache
def exact_laws() -> tuple[np.ndarray, ...]:
    """Of the `LAWS`, [V ** HORIZON] each."""
    target, params = transformer_pair()[:2]
    return tuple(
        testing.exact_law(target, params, law.prompt, sampling(1, **law.sampling), HORIZON, EOS_ID)
        for law in LAWS
    )


def sampled_law(program: Program, num_tests: int = 1, num_rows: int | None = None) -> Check:
    """Decodes three tokens in rows of either law, side by side, and compares by chi-square.

    Args:
        program: the decoder.
        num_tests: how many programs are tested in all.
        num_rows: per law; by default what `FAULT` and `DETECTION` take.
    """

    def run() -> tuple[bool, str, dict[str, Any]]:
        laws, num_laws = exact_laws(), len(LAWS)
        cells = max(int((law > 0).sum()) for law in laws)
        needed = num_rows or testing.sample_size(cells, FAULT, num_tests * num_laws, DETECTION)
        num_calls = -(-needed * num_laws // ROWS)
        which = np.arange(ROWS) % num_laws
        prompt = np.zeros((ROWS, WIDTH), np.int32)
        prompt_length = np.array([len(law.prompt) for law in LAWS], np.int32)[which]
        for i, law in enumerate(LAWS):
            prompt[which == i, : len(law.prompt)] = law.prompt
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        settings: dict[str, Any] = {
            name: np.array([law.sampling.get(name, value) for law in LAWS])[which]
            for name, value in off.items()
        }
        seed = zlib.crc32(program.name.encode())
        vocab_size = program.pair.target.vocab_size
        counts = np.zeros((num_laws, vocab_size**HORIZON), np.int64)
        how = sampling(ROWS, **settings)
        for keys in jax.random.split(jax.random.key(seed), (num_calls, ROWS)):
            limit = prompt_length + HORIZON
            result = program.decode(Batch(keys, how, prompt, prompt_length, limit))
            for i in range(num_laws):
                rows = which == i
                counts[i] += testing.count_strings(
                    result.tokens[rows],
                    prompt_length[rows],
                    result.length[rows],
                    HORIZON,
                    vocab_size,
                    EOS_ID,
                )
        tests = [
            testing.law_test(count, law, num_tests * num_laws)
            for count, law in zip(counts, laws, strict=True)
        ]
        least = min(tests, key=lambda test: (test.passed, test.p_value))
        verdict = (
            f"p-value {least.p_value:.2g}, at least {least.threshold:.1g} passes; "
            f"{least.num_rows} rows a law"
        )
        if any(test.impossible for test in tests):
            verdict += f"; {sum(test.impossible for test in tests)} rows that cannot be"
        power = testing.power(least.num_rows, cells, FAULT, num_tests * num_laws)
        figures = {"tests": [test._asdict() for test in tests], "power": power, "fault": FAULT}
        return all(test.passed for test in tests), verdict, figures

    return checked("sampling", run)


# ------------------------------------------------------------------- text determined by the row


def _compared(name: str, program: Program, rows: np.ndarray) -> Check:
    """The scenario's `rows` [B] bool against plain decoding."""

    def run() -> tuple[bool, str, dict[str, Any]]:
        expected, result = plain(), program.result
        written = np.arange(SLOTS) < expected.length[:, None]
        wrong = ((result.tokens != expected.tokens) & written).any(1)
        wrong |= result.length != expected.length
        count = int((wrong & rows).sum())
        return count == 0, f"{count} of {int(rows.sum())} rows differ", {"different": count}

    return checked(name, run)


def _is_greedy(program: Program) -> np.ndarray:
    return np.asarray(scenario(program.pair.target.vocab_size).sampling.temperature) == 0


def greedy_identity(program: Program) -> Check:
    """Greedy rows equal the uncached argmax loop's."""
    return _compared("greedy", program, _is_greedy(program))


def invariance(program: Program) -> Check:
    """Sampled rows equal plain sampling's."""
    return _compared("invariance", program, ~_is_greedy(program))


def row_independence(program: Program) -> Check:
    """Rows elsewhere, among others, or alone, write what they wrote."""

    def run() -> tuple[bool, str, dict[str, Any]]:
        batch, alone = scenario(program.pair.target.vocab_size), program.result
        rng = np.random.default_rng(zlib.crc32(program.name.encode()))
        different = compared = 0

        def put(rows: np.ndarray, others: Batch) -> None:
            nonlocal different, compared
            place = rng.permutation(ROWS)[: len(rows)]
            source = np.arange(ROWS)
            source[place] = ROWS + rows
            both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), others, batch)
            mixed = program.decode(both.take(source))
            different += sum(
                mixed.row(at) != alone.row(row) for row, at in zip(rows, place, strict=True)
            )
            compared += len(rows)

        fresh = jax.random.split(jax.random.key(4), ROWS)
        shuffled = batch.take(rng.permutation(ROWS))
        put(np.arange(0, ROWS, 2), shuffled._replace(rng_keys=fresh))
        how = batch.sampling
        uncut = np.asarray((how.top_k == 0) & (how.top_p == 1) & (how.min_p == 0))
        greedy = shuffled._replace(sampling=sampling(ROWS))
        put(np.flatnonzero(uncut)[:100], greedy)
        # A row by itself: all others are at their limit from the start.
        idle = shuffled._replace(limit=np.ones(ROWS, np.int32))
        longest = np.argsort(-alone.num_steps, kind="stable")
        for kind in (_is_greedy(program), ~_is_greedy(program)):
            put(longest[kind[longest]][:1], idle)
        verdict = f"{different} of {compared} rows differ among others"
        return different == 0, verdict, {"different": different, "compared": compared}

    return checked("rows", run)


def foreign_drafts(program: Program) -> Check:
    """After steps that judged others' drafts, caches are right and own drafts accepted as before.

    The same rows with `MOST` foreign drafts at the start and without any; steps from
    `MOST + RECOVERY` on are compared, row by row, with an error of four standard deviations.
    """

    def run() -> tuple[bool, str, dict[str, Any]]:
        weights = program.params.drafter._replace(interruptions=jnp.int32(MOST))
        batch = scenario(program.pair.target.vocab_size)
        disturbed = program.decode(batch, program.params._replace(drafter=weights))
        figures: dict[str, Any] = {}
        wrong, differ = "", np.zeros(ROWS, bool)
        if program.parts.verifier.drafter_invariant:
            differ = (disturbed.length != program.result.length) | (
                history(disturbed.tokens, disturbed.length, 1)
                != history(program.result.tokens, program.result.length, 1)
            ).any(1)
            figures["different"] = int(differ.sum())
        rates, errors = [], []
        for result in (program.result, disturbed):
            steps, gained = result.interrupted.counted, result.interrupted.gained
            if not steps.sum():
                return True, "rows are too short to tell", figures
            rate = gained.sum() / steps.sum()
            rates.append(float(rate))
            errors.append(float(((gained - rate * steps) ** 2).sum()) ** 0.5 / steps.sum())
        lost, error = rates[0] - rates[1], float(np.hypot(*errors))
        figures |= {"undisturbed": rates[0], "disturbed": rates[1], "error": error}
        if differ.any():
            wrong = f"{int(differ.sum())} of {ROWS} rows differ; "
        verdict = (
            f"{wrong}{rates[1]:.3f} tokens per step from the step {RECOVERY + 1} after foreign "
            f"drafts on, {rates[0]:.3f} without"
        )
        return not wrong and lost <= 4 * error, verdict, figures

    return checked("foreign drafts", run)


def ends(program: Program) -> Check:
    """Texts keep their prompt, end after their first EOS or at the limit, and nowhere else."""

    def run() -> tuple[bool, str, dict[str, Any]]:
        batch, result = scenario(program.pair.target.vocab_size), program.result
        at = np.arange(SLOTS)
        in_prompt = at < batch.prompt_length[:, None]
        new = ~in_prompt & (at < result.length[:, None])
        is_eos = (result.tokens == EOS_ID) & new
        end = np.maximum(np.minimum(batch.limit, SLOTS), batch.prompt_length)
        gained = result.length - batch.prompt_length
        most = result.num_steps * (program.decoder.proposal.depth + 1)
        changed = result.tokens[:, :WIDTH] != batch.prompt
        wrong = {
            "prompts were changed": (changed & in_prompt[:, :WIDTH]).any(1),
            "rows are not done": ~result.done,
            "text goes on after an EOS": (is_eos & (at < result.length[:, None] - 1)).any(1),
            "text ends early": (result.length < end) & ~is_eos.any(1),
            "text goes beyond its limit": result.length > end,
            "steps were miscounted": (result.num_steps > gained) | (gained > most),
        }
        found = {text: int(rows.sum()) for text, rows in wrong.items() if rows.any()}
        verdict = "; ".join(f"{text} in {n} rows" for text, n in found.items())
        return not found, verdict or f"{ROWS} rows end where they should", found

    return checked("ends", run)


def cached_history(program: Program, tolerance: float = 1e-3) -> Check:
    """Every cache holds what absorbing the whole text at once puts there.

    Of the rows whose text is short enough to be a prompt of the same program.
    """

    def run() -> tuple[bool, str, dict[str, Any]]:
        result = program.result
        batch = scenario(program.pair.target.vocab_size)
        short = (result.length <= WIDTH) & (result.length > batch.prompt_length)
        again = batch._replace(
            prompt=history(result.tokens, result.length, 1)[:, :WIDTH],
            prompt_length=np.minimum(result.length, WIDTH),
            limit=np.ones(ROWS, np.int32),
        )
        fresh = program.decode(again)
        worst, lengths = 0.0, True
        for old, new in zip(result.caches, fresh.caches, strict=True):
            lengths &= bool((old.length == new.length)[short].all())
            for x, y in zip(old.keys + old.values, new.keys + new.values, strict=True):
                apart = history(x, new.length, 2) - history(y, new.length, 2)
                worst = float(np.maximum(worst, abs(apart[short]).max(initial=0)))  # NaN stays
        count = int(short.sum())
        verdict = f"largest difference {worst:.1e} in {len(fresh.caches)} caches of {count} rows"
        if not lengths:
            verdict += "; lengths differ"
        figures = {"largest_difference": worst, "rows": count}
        return lengths and worst < tolerance, verdict, figures

    return checked("caches", run)


def bfloat16_margin(factory: Factory) -> Check:
    """Where float32 arithmetic on the same weights would not have written greedy text in bfloat16.

    Exact arithmetic aside, a pass over a tree rounds otherwise than one over the whole text, and on
    every processor otherwise. Passes while float32 prefers its own token by no more than the pass
    over the whole text in bfloat16 moves any logit.
    """

    def run() -> tuple[bool, str, dict[str, Any]]:
        pair, exact = transformer_pair(dtype=jnp.bfloat16), transformer_pair().target
        decoder, params = build_decoder(factory, pair)
        batch = scenario(pair.target.vocab_size)._replace(sampling=sampling(ROWS))
        state = engine.decode(decoder, params, *batch, SLOTS)
        tokens, length = np.asarray(state.context.tokens), np.asarray(state.context.length)

        def whole(model: Model, params: PyTree) -> np.ndarray:
            """[B, S - 1, V], of the tokens from the second."""
            logits = jax.jit(lambda tokens: forward(model, params, tokens).logits)(tokens)
            return np.asarray(logits)[:, :-1]

        wide = jax.tree.map(lambda x: x.astype(jnp.float32), pair.target_params)
        logits = whole(exact, wide)
        at = np.arange(1, SLOTS)
        new = (at >= batch.prompt_length[:, None]) & (at < length[:, None])
        written = np.take_along_axis(logits, tokens[:, 1:, None], 2)[..., 0]
        margin = (logits.max(-1) - written)[new]
        rounding = abs(whole(pair.target, pair.target_params) - logits)[new].max()
        differs = np.zeros_like(new)
        differs[new] = ~(margin <= 0)  # NaN differs
        figures = {
            "different_rows": int(differs.any(1).sum()),
            "rows": ROWS,
            "largest_margin": float(margin.max()),
            "rounding": float(rounding),
        }
        verdict = (
            f"{figures['different_rows']} of {ROWS} rows differ from float32's, by a margin of at "
            f"most {figures['largest_margin']:.2g} where rounding moves logits by {rounding:.2g}"
        )
        return bool(margin.max() <= rounding), verdict, figures

    return checked("bfloat16", run)
