"""A Hugging Face directory to text, in two lines.

    model = specjax.load("checkpoints/target")
    print(specjax.generate(model, "import os").texts[0])

`load` reads a model, its tokenizer and its chat template; `generate` continues prompts or
conversations. Under the default rule, `match`, what it writes depends on the prompt, the seed and
the sampling parameters alone: a drafter, and whatever else is in the batch, change the time only.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct as struct
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from specjax import cache as caches
from specjax import checkpoints, engine, presets, prompts, sampling
from specjax.build import mentions
from specjax.data import chat, tokenizers
from specjax.kernels.vocabulary import largest
from specjax.models import hub
from specjax.types import Array, Decoder, DecodeState, Drafter, Params, PyTree, StepInfo, Verifier

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]


class LanguageModel:
    """A model with its tokenizer and its drafts, and the decoders that it was given so far.

    Attributes:
        directory: where it was read from.
        checkpoints: target, drafts, weights and tokenizer.
        template: of conversations; None if the directory has none.
    """

    def __init__(
        self,
        directory: Path,
        models: checkpoints.Checkpoints,
        template: chat.Template | None,
    ) -> None:
        self.directory = directory
        self.checkpoints = models
        self.template = template
        # A decoder is what a program is compiled for, so the same request has to get the same one.
        self._decoders: dict[Any, tuple[Decoder, Params]] = {}
        self._compiled: set[Any] = set()

    @property
    def context(self) -> int:
        """Tokens that the target and its drafts have positions for."""
        return self.checkpoints.context

    def decoder(
        self,
        drafter: str | Mapping[str, Any] | Drafter | None = "auto",
        verifier: str | Verifier = "match",
        is_greedy: bool = False,
        options: presets.Options = presets.DEFAULTS,
        drafters: Mapping[str, Any] = presets.DRAFTERS,
        weights: Mapping[str, Any] = presets.WEIGHTS,
        drafter_params: PyTree = (),
    ) -> tuple[Decoder, Params]:
        """The decoder of a request and its weights; arguments as for `presets.decoder`."""
        drafter = "none" if drafter is None else drafter
        if isinstance(drafter, Drafter):
            key: Any = drafter, verifier
        else:
            name, spec = presets.named(drafter, self.checkpoints.drafts, drafters)
            is_greedy &= mentions(spec, "build")  # others draft the same for all rows
            key = repr((spec, verifier, is_greedy, options, weights.get(name)))
        if key not in self._decoders:
            self._decoders[key] = presets.decoder(
                self.checkpoints, drafter, verifier, is_greedy, options, drafters, weights
            )
        decoder, params = self._decoders[key]
        if isinstance(drafter, Drafter):
            params = params._replace(drafter=drafter_params)
        return decoder, params

    def encode(self, prompt: Prompt, template_variables: Mapping[str, Any] = {}) -> np.ndarray:
        """A prompt's tokens [T]: of a text, of a conversation by the chat template, or as given.

        Raises:
            ValueError: an empty prompt, a conversation without a template for it, tokens that the
                model does not have.
        """
        if isinstance(prompt, str):
            return self._known(prompts.encode([prompt], self.checkpoints.tokenizer)[0])
        if not len(prompt):
            raise ValueError("A prompt is empty; need at least one token or message.")
        if not isinstance(prompt[0], Mapping):
            return self._known(np.asarray(prompt))
        if self.template is None:
            raise ValueError(
                f"{self.directory} has no chat template but got {len(prompt)} message(s); need a "
                "prompt of text, or a chat_template.jinja there."
            )
        text = self.template.render(prompt, **template_variables)  # type: ignore[arg-type]
        encoded = self.checkpoints.tokenizer.encode(text, add_special_tokens=False)
        return self._known(np.asarray(encoded.ids))

    def _known(self, tokens: np.ndarray) -> np.ndarray:
        size = self.checkpoints.target.vocab_size
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"A prompt is {tokens.tolist()!r:.60}; need text, token ids or messages."
            )
        if tokens.min() < 0 or tokens.max() >= size:
            raise ValueError(
                f"A prompt has token ids {tokens.min()} to {tokens.max()}; need ids below {size}."
            )
        return tokens.astype(np.int32)


class Logprobs(NamedTuple):
    """What the target's own law says of a text of T tokens: before temperature and truncation."""

    tokens: np.ndarray  # [T] float32, log-probabilities of the tokens written
    top_ids: np.ndarray  # [T, k] int32, the likeliest tokens, in order
    top: np.ndarray  # [T, k] float32, theirs


class Statistics(NamedTuple):
    """What a call took. Times are in seconds, and compilation is in none but its own."""

    num_tokens: int  # written, those after a stop string included
    num_passes: int  # of the target, summed over rows, prompts excluded
    num_drafted: int  # tokens guessed
    seconds_to_first_token: float  # from a batch's start until its first step is done; the mean
    seconds: float  # of all that came after these first steps
    seconds_compile: float  # 0 where all was compiled already
    tokens_per_second: float  # after the first steps
    tokens_per_pass: float
    acceptance_rate: float  # accepted / drafted; fillers may be right by chance


class Generation(NamedTuple):
    """What was written, one entry per prompt and sample: a prompt's samples come together."""

    texts: list[str]  # up to a stop string, without special tokens
    tokens: list[list[int]]  # up to and with the end or what completed a stop string
    logprobs: list[Logprobs] | None
    finish_reasons: list[str]  # "stop" by an end or a stop string, "length" by a limit
    stop_reasons: list[int | str | None]  # the id or the string
    statistics: Statistics


def load(
    name: str | Path,
    drafts: str | Path | Mapping[str, str | Path] = "",
    dtype: str = "auto",
    cache_dtype: str = "auto",
) -> LanguageModel:
    """Reads a model, and what drafts for it, from directories or by their remote names.

    Args:
        name: a directory of Hugging Face's, or a name at huggingface.co such as "owner/model".
        drafts: the same of a draft model or of Medusa, Hydra or EAGLE heads; several by name.
        dtype, cache_dtype: see `checkpoints.load`.

    Raises:
        ValueError: what cannot be found or read; a family that is not supported.
    """
    if not str(name):
        raise ValueError("No target was given; need a directory, or a name such as owner/model.")
    directory = hub.resolve(name)
    named = {"draft": drafts} if isinstance(drafts, (str, Path)) else drafts
    found = {each: hub.resolve(draft) for each, draft in named.items() if draft}
    models = checkpoints.load(directory, found, dtype, cache_dtype)
    return LanguageModel(directory, models, chat.load(directory))


def generate(
    model: LanguageModel,
    prompts_or_messages: Prompt | Sequence[Prompt],
    drafter: str | Mapping[str, Any] | Drafter | None = "auto",
    verifier: str | Verifier = "match",
    *,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: ArrayLike = 0.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    seed: int | Sequence[int] = 0,
    num_samples: int = 1,
    first_sample: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    logprobs: int | None = None,
    stream: Callable[[int, str], None] | None = None,
    on_batch: Callable[[int, Generation], None] | None = None,
    batch_size: int = 8,
    steps_per_call: int = 0,
    template_variables: Mapping[str, Any] = {},
    options: presets.Options = presets.DEFAULTS,
    drafters: Mapping[str, Any] = presets.DRAFTERS,
    weights: Mapping[str, Any] = presets.WEIGHTS,
    drafter_params: PyTree = (),
) -> Generation:
    """Continues prompts.

    Lengths and batches are padded to powers of two: a later call of similar size, with whatever
    sampling parameters, compiles nothing.

    Args:
        model: from `load`.
        prompts_or_messages: a text, a conversation (a list of {"role": ..., "content": ...}) or
            token ids; or a list of these.
        drafter: "auto" is the draft's own or else `lookup`, which needs no training; None is plain
            decoding; or a name, a spec or a `Drafter`, see `presets.decoder`.
        verifier: see `presets.decoder`.
        max_new_tokens, temperature, top_k, top_p, min_p, seed: one for all prompts or one each.
        num_samples: of each prompt. A sample's key is made of its prompt's seed and its number.
        first_sample: the first one's number.
        stop: strings that end a text, wherever they lie in its tokens.
        logprobs: also returns the log-probabilities of the tokens and of the so many likeliest.
        stream: called with the number of a text and what has been written of it since.
        on_batch: called after each batch with the number of its first text and what came of it.
        batch_size: rows decoded at once, at most.
        steps_per_call: steps between two looks at the text, if `stream` or `stop` needs any;
            0 is 2 for `stream` and 8 for `stop`.
        template_variables: what a chat template reads besides messages, such as `tools`.
        options, drafters, weights, drafter_params: see `presets.decoder`.

    Raises:
        ValueError: a prompt that is empty or does not fit the context, parameters out of range or
            of another number than the prompts, an empty stop string, and as `presets.decoder`.
    """
    given = _several(prompts_or_messages)
    tokenizers.check_stop(stop)
    vocab_size = model.checkpoints.target.vocab_size
    for what, number, least, most in (
        ("num_samples", num_samples, 1, np.inf),
        ("batch_size", batch_size, 1, np.inf),
        ("steps_per_call", steps_per_call, 0, np.inf),
        ("logprobs", 0 if logprobs is None else logprobs, 0, vocab_size),
    ):
        if not least <= number <= most:
            bound = f"at least {least}" if most == np.inf else f"{least} to {most}"
            raise ValueError(f"{what} is {number}; it must be {bound}.")
    laws = sampling.checked(len(given), temperature, top_k, top_p, min_p)
    limits = _each("max_new_tokens", max_new_tokens, len(given), 1)
    seeds = _each("seed", seed, len(given), 0)
    firsts = _each("first_sample", first_sample, len(given), 0)
    # From here on every sample is a row of its own.
    encoded = [model.encode(prompt, template_variables) for prompt in given]
    encoded = [tokens for tokens in encoded for _ in range(num_samples)]
    laws = tuple(np.repeat(law, num_samples) for law in laws)
    limits, seeds = np.repeat(limits, num_samples), np.repeat(seeds, num_samples)
    samples = (firsts[:, None] + np.arange(num_samples)).reshape(-1)

    at_once = min(batch_size, 1 << (len(encoded) - 1).bit_length())
    batches = prompts.batches(encoded, at_once, limits, model.context)
    max_length = prompts.max_length(batches)
    is_greedy = bool((laws[0] == 0).all())
    specs = drafters, weights, drafter_params
    decoder, params = model.decoder(drafter, verifier, is_greedy, options, *specs)

    def prefill(batch: prompts.Batch, length: np.ndarray) -> _Progress:
        which = np.minimum(batch.which, len(encoded) - 1)
        state = engine.prefill(
            decoder,
            params,
            _keys(seeds[which], samples[which]),
            sampling.sampling(at_once, *(law[which] for law in laws)),
            jnp.asarray(batch.tokens),
            jnp.asarray(length),
            jnp.asarray(batch.limit),
            max_length,
        )
        return state, _nothing_yet(at_once, max_length, logprobs)

    seconds_compile = 0.0
    program = decoder, batches[0].tokens.shape, max_length, logprobs
    if program not in model._compiled:
        # On prompts of one token and without a step, so that what follows is timed alone.
        begin = time.perf_counter()
        shortest = prefill(batches[0], np.ones_like(batches[0].length))
        jax.block_until_ready(_advance(decoder, params, shortest, 0))
        seconds_compile = time.perf_counter() - begin
        model._compiled.add(program)

    steps = steps_per_call or (2 if stream else 8 if stop else max_length)
    writers = [tokenizers.Writer(model.checkpoints.tokenizer, stop) for _ in encoded]
    found: list[_Batch] = []
    for batch in batches:
        begin = time.perf_counter()
        progress = _advance(decoder, params, prefill(batch, batch.length), 1)
        jax.block_until_ready(progress)
        after = time.perf_counter()
        at_first = int(_num_tokens(progress, batch).sum())
        progress = _written(progress, batch, writers, stream)
        while not bool(progress[0].done.all()):
            progress = _advance(decoder, params, progress, steps)
            progress = _written(progress, batch, writers, stream)
        seconds = time.perf_counter() - after
        rows = _rows(progress, batch, writers, model.checkpoints.eos_ids)
        found.append(_Batch(rows, at_first, after - begin, seconds))
        if on_batch is not None:
            on_batch(int(batch.which[0]), _generation(found[-1:], 0.0))
    return _generation(found, seconds_compile)


# ------------------------------------------------------------------------------- what was asked for


def _several(given: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """A list of prompts, of one as of several."""
    if isinstance(given, str):
        return [given]
    if not len(given):
        raise ValueError("The list of prompts is empty; need at least one.")
    is_one = isinstance(given[0], (Mapping, int, np.integer))
    return [given] if is_one else given  # type: ignore[list-item,return-value]


def _each(name: str, value: int | Sequence[int], count: int, least: int) -> np.ndarray:
    """Whole numbers [count], of one for all or one each."""
    found = np.asarray(value)
    if found.shape not in ((), (count,)):
        raise ValueError(
            f"{name} has shape {found.shape} for {count} prompt(s); need one number, or one each."
        )
    if found.dtype.kind not in "iu":
        raise ValueError(f"{name} is {value!r:.60}; need whole numbers.")
    wrong = found[~((found >= least) & (found < 1 << 32))]
    if wrong.size:
        raise ValueError(f"{name} is {wrong[0]}; it must be from {least} to 2^32 - 1.")
    return np.broadcast_to(found, [count])


@jax.jit
def _keys_of(seeds: Array, samples: Array) -> Array:
    return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(seeds, samples)


def _keys(seeds: np.ndarray, samples: np.ndarray) -> Array:
    """[B] keys: a row's place in the batch is not in them."""
    return _keys_of(jnp.asarray(seeds, jnp.uint32), jnp.asarray(samples, jnp.uint32))


# -------------------------------------------------------------------------------------- the loop


@struct.dataclass
class _Memory:
    """What is remembered of the steps that led to a state."""

    num_drafted: Array  # [B] int32
    # Of the token at each position, and of the likeliest there; without any positions if nobody
    # asked.
    logprobs: Array  # [B, S or 0] float32
    top_ids: Array  # [B, S or 0, k] int32
    top: Array  # [B, S or 0, k] float32


_Progress = tuple[DecodeState, _Memory]


@functools.partial(jax.jit, static_argnames=("batch_size", "max_length", "logprobs"))
def _nothing_yet(batch_size: int, max_length: int, logprobs: int | None) -> _Memory:
    shape = (batch_size, 0 if logprobs is None else max_length)
    tops = (*shape, logprobs or 0)
    return _Memory(
        jnp.zeros([batch_size], jnp.int32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(tops, jnp.int32),
        jnp.zeros(tops, jnp.float32),
    )


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="progress")
def _advance(
    decoder: Decoder, params: Params, progress: _Progress, num_steps: int | Array
) -> _Progress:
    """As `engine.advance`, remembering what was asked for."""
    return engine.steps(decoder, params, progress[0], num_steps, progress[1], _remember)


def _remember(memory: _Memory, old: DecodeState, info: StepInfo) -> _Memory:
    memory = dataclasses.replace(memory, num_drafted=memory.num_drafted + info.num_drafted)
    if not memory.logprobs.shape[1]:
        return memory
    law = jax.nn.log_softmax(info.logits)
    own = jnp.take_along_axis(law, info.tokens[..., None], -1)[..., 0]
    ids = largest(law, memory.top.shape[2])
    top = jnp.take_along_axis(law, ids, -1)
    start, count = old.context.length, info.num_tokens
    return dataclasses.replace(
        memory,
        logprobs=caches.write(memory.logprobs, own, start, count),
        top_ids=caches.write(memory.top_ids, ids, start, count),
        top=caches.write(memory.top, top, start, count),
    )


# ------------------------------------------------------------------------------------- its results


class _Row(NamedTuple):
    """What became of a prompt."""

    text: str
    tokens: list[int]
    logprobs: Logprobs | None
    stopped_by: int | str | None
    num_tokens: int  # written, those after a stop string included
    num_passes: int
    num_drafted: int


class _Batch(NamedTuple):
    """What became of prompts decoded together."""

    rows: list[_Row]
    num_at_first: int  # tokens that the first steps wrote
    seconds_to_first: float
    seconds: float  # after that


def _num_tokens(progress: _Progress, batch: prompts.Batch) -> np.ndarray:
    return np.asarray(progress[0].context.length) - batch.length


def _is_prompt(batch: prompts.Batch) -> np.ndarray:
    """Rows that are more than padding."""
    return np.flatnonzero(batch.limit > 1)


def _written(
    progress: _Progress,
    batch: prompts.Batch,
    writers: Sequence[tokenizers.Writer],
    stream: Callable[[int, str], None] | None,
) -> _Progress:
    """Writes what is new; rows that met a stop string are done."""
    state, memory = progress
    context = state.context
    tokens, length, done = map(np.asarray, (context.tokens, context.length, state.done))
    met = np.zeros(len(done), bool)
    for row in _is_prompt(batch):
        writer = writers[batch.which[row]]
        if writer.stopped is None:
            seen = batch.length[row] + writer.num_tokens
            new = writer.push(tokens[row, seen : length[row]], final=bool(done[row]))
            if stream is not None and new:
                stream(int(batch.which[row]), new)
        met[row] = writer.stopped is not None
    if not (met & ~done).any():
        return progress
    return dataclasses.replace(state, done=state.done | jnp.asarray(met)), memory


def _rows(
    progress: _Progress,
    batch: prompts.Batch,
    writers: Sequence[tokenizers.Writer],
    eos_ids: Sequence[int],
) -> list[_Row]:
    """What came of a batch."""
    state, memory = progress
    count, tokens = _num_tokens(progress, batch), np.asarray(state.context.tokens)
    passes, drafted = np.asarray(state.num_steps), np.asarray(memory.num_drafted)
    told = tuple(map(np.asarray, (memory.logprobs, memory.top_ids, memory.top)))
    found = []
    for row in _is_prompt(batch):
        writer = writers[batch.which[row]]
        own = slice(batch.length[row], batch.length[row] + writer.num_tokens)
        ids = tokens[row, own].tolist()
        stopped_by: int | str | None = writer.stopped
        if stopped_by is None and ids and ids[-1] in eos_ids:
            stopped_by = ids[-1]
        found.append(
            _Row(
                writer.text,
                ids,
                Logprobs(*(x[row, own] for x in told)) if told[0].shape[1] else None,
                stopped_by,
                *(int(x[row]) for x in (count, passes, drafted)),
            )
        )
    return found


def _generation(batches: Sequence[_Batch], seconds_compile: float) -> Generation:
    rows = [row for batch in batches for row in batch.rows]
    num_tokens = sum(row.num_tokens for row in rows)
    num_passes = sum(row.num_passes for row in rows)
    num_drafted = sum(row.num_drafted for row in rows)
    seconds = sum(batch.seconds for batch in batches)
    logprobs = [row.logprobs for row in rows if row.logprobs is not None]
    return Generation(
        [row.text for row in rows],
        [row.tokens for row in rows],
        logprobs or None,
        ["length" if row.stopped_by is None else "stop" for row in rows],
        [row.stopped_by for row in rows],
        Statistics(
            num_tokens=num_tokens,
            num_passes=num_passes,
            num_drafted=num_drafted,
            seconds_to_first_token=float(np.mean([batch.seconds_to_first for batch in batches])),
            seconds=seconds,
            seconds_compile=seconds_compile,
            tokens_per_second=(num_tokens - sum(b.num_at_first for b in batches)) / seconds,
            tokens_per_pass=num_tokens / num_passes,
            acceptance_rate=(num_tokens - num_passes) / num_drafted if num_drafted else 0.0,
        ),
    )
