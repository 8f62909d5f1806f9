"""Splits the time of one step into its parts, each timed alone.

    python decode/profile.py                                     # configs/bench/llama_30m.py

A part runs in a compiled loop on the shapes of the real step, see `specjax/timing.py`. Repeats of
all parts are interleaved, medians are shown.

    target       one target pass over the N nodes, mask and positions included
    drafter      the drafter's `propose` and `observe`, the law of its draft left out where the
                 verifier does not read it, as the compiler leaves it out of a step
    drafter, cold
                 the same when the target's weights are read in between: alone, a small drafter's
                 stay in the processor's cache, which in a step the target's displace
    target and drafter
                 the two in one loop, as in a step
    choose       of the drafter: picking tokens from D rows of draft logits, one by one
    warp, verify on [N, V] logits, and both in one program as in a step, where they fuse
    noise        of `match`: the [P, V] shared noise
    absorb       writing tokens and committing keys and values
    step         `engine.advance`, everything at once
    rest         step - (target and drafter + warp and verify + absorb)

Overheads, medians of ratios of one repeat: step / (target and drafter), step / (target + drafter)
and step / (target + drafter, cold).
Writes results.json and results.md into `config.output`.
"""

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from specjax import cache as caches
from specjax import checkpoints, engine, sampling, scripts, trees
from specjax.build import build
from specjax.drafters.grow import Choose
from specjax.models.transformer import TransformerConfig, num_params, transformer
from specjax.timing import interleaved, loop, nothing, steps
from specjax.types import (
    Array,
    Block,
    Cache,
    Context,
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Keys,
    Model,
    ModelOutput,
    Outcome,
    Params,
    PyTree,
    Sampling,
    Verdict,
    Verifier,
)

# (inputs, carry) -> carry, the inputs, which never change, and the first carry.
Part = tuple[Callable[[Any, Any], Any], Any, Any]

_MODELS = "target and drafter"
_READ, _READ_AND_DRAFT = "reading the target", "reading the target, drafter"
_SUM = (_MODELS, "warp and verify", "absorb")  # parts that make up a step
_WITHIN = ("target", "drafter", "drafter, cold", "choose", "warp", "noise", "verify")  # of others


def main(c: ConfigDict) -> None:
    run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Profiles, writes and prints. Returns the records."""
    if c.repeats < 1 or c.seconds <= 0:
        raise ValueError(f"repeats is {c.repeats}, seconds {c.seconds}; need at least 1, over 0.")
    if not 1 <= c.prompt_length <= c.max_length // 2:
        raise ValueError(
            f"prompt_length is {c.prompt_length}; need 1 to {c.max_length // 2}, half the buffer."
        )
    console = Console()
    key = jax.random.key(c.seed)
    drafts = {name: _draft(spec, key) for name, spec in c.drafts.items()}
    layers = checkpoints.feature_layers(drafts)
    target = transformer(TransformerConfig(**c.target), feature_layers=layers)
    target_params = jax.jit(target.init)(key)
    records = []
    for name, case in c.cases.items():
        drafter = build(case.drafter, **checkpoints.given(target, drafts))
        params = checkpoints.params(target_params, drafts, case.drafter)
        verifier = build(case.verifier)
        decoder = engine.decoder(target, drafter, verifier)
        choose = build(case.choose)
        state = _start(c, decoder, params, target.vocab_size, case.temperature)
        parts = parts_of(target, drafter, verifier, choose, params, state)
        loops = {part: loop(*spec) for part, spec in parts.items()}
        loops["step"] = steps(decoder, params, state)
        # Rows that were full would make the last steps free.
        most = {"step": (c.max_length - c.prompt_length) // (decoder.proposal.depth + 1)}
        times = interleaved(loops, most, c.repeats, c.seconds, name, console)
        del parts, loops, state
        ms = {part: statistics.median(values) for part, values in times.items()}
        records.append(
            {
                "case": name,
                "temperature": case.temperature,
                "batch_size": c.batch_size,
                "max_length": c.max_length,
                "num_nodes": decoder.proposal.num_nodes,
                "milliseconds": ms,
                "rest": _paired(times, lambda t: t["step"] - sum(t[part] for part in _SUM)),
                "overhead": _paired(times, lambda t: t["step"] / t[_MODELS]),
                "drafter_cold": _paired(times, _cold),
                "overhead_alone": _paired(
                    times, lambda t: t["step"] / (t["target"] + t["drafter"])
                ),
                "overhead_cold": _paired(times, lambda t: t["step"] / (t["target"] + _cold(t))),
                "target_parameters": num_params(params.target),
                "draft_parameters": num_params(params.drafter),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
        )
    _write(c, records, console)
    return records


def _draft(spec: ConfigDict, key: Array) -> checkpoints.Drafting:
    """Heads that the spec names, or else a model of its shape, with random weights."""
    model = build(spec) if "call" in spec else transformer(TransformerConfig(**spec))
    return checkpoints.Drafting(model, jax.jit(model.init)(key))


def _start(
    c: ConfigDict, decoder: Decoder, params: Params, vocab_size: int, temperature: float
) -> DecodeState:
    """Rows after a random prompt that never end before the buffer does."""
    shape = (c.batch_size, c.prompt_length)
    prompt = jax.random.randint(jax.random.key(c.seed + 1), shape, 0, vocab_size)
    return engine.prefill(
        decoder,
        params,
        jax.random.split(jax.random.key(c.seed), c.batch_size),
        sampling.sampling(c.batch_size, temperature),
        prompt,
        jnp.full([c.batch_size], c.prompt_length),
        jnp.full([c.batch_size], c.max_length),
        c.max_length,
    )


def _cold(times: Mapping[str, float]) -> float:
    """The drafter's time after the target's weights were read."""
    return times[_READ_AND_DRAFT] - times[_READ]


# -------------------------------------------------------------------------------------------- parts


def parts_of(
    target: Model,
    drafter: Drafter,
    verifier: Verifier,
    choose: Choose | None,
    params: Params,
    state: DecodeState,
) -> dict[str, Part]:
    """Every part with its inputs and first carry, on what one real step sees.

    Without a `choose` there is no part of that name.
    """
    context, keys = state.context, state.rng_keys
    depth = drafter.proposal.depth

    def score(params: PyTree, context: Context, draft: Draft) -> tuple[ModelOutput, Block]:
        mask = trees.ancestor_mask(draft.parents)
        positions = context.length[:, None] - 1 + trees.depths(mask)
        return target.apply(params, draft.tokens, positions, mask, context.cache)

    @jax.jit
    def reveal(params: Params, state: DecodeState) -> tuple[Draft, ModelOutput, Block, Array]:
        draft, _ = drafter.propose(params, keys, state.drafter, state.context)
        output, block = score(params.target, state.context, draft)
        return draft, output, block, sampling.warp(output.logits, state.context.sampling)

    draft, output, block, warped = reveal(params, state)
    judges_by_law = reads_law(
        lambda x: verifier.verify(params, keys, context, x, output, warped), draft
    )
    rows = draft.tokens.shape[0]
    path = jnp.zeros((rows, depth + 1), jnp.int32)

    # The parents are constants, as they are where a builder makes them.
    parents = jax.device_get(draft.parents)

    def guess(tokens: Array, probs: Array | None) -> Draft:
        return replace(draft, tokens=tokens, parents=jnp.asarray(parents), probs=probs)

    def pass_target(inputs: tuple, carry: tuple) -> tuple:
        tokens, length = carry
        params, context = inputs
        output, _ = score(params, replace(context, length=length), guess(tokens, None))
        zero = nothing(output.logits)
        return tokens + zero, length + zero

    def drafting(reveal: Callable[[tuple, Context, Draft], ModelOutput]) -> Callable:
        """The drafter's two passes around whatever the target reveals."""

        def body(inputs: tuple, carry: tuple) -> tuple:
            params, _, cache = inputs
            believed, tokens, length = carry
            now = replace(context, tokens=tokens, length=length, cache=cache)
            new, believed = drafter.propose(params, keys, believed, now)
            output = reveal(inputs, now, new)
            used = nothing(new.tokens) + nothing(output.logits[:, :, :1])
            if judges_by_law:
                used += nothing(new.probs)
            verdict = Verdict(path, jnp.ones(rows, jnp.int32) + used, new.tokens[:, -1])
            tokens = caches.write(tokens, new.tokens[:, -1:], length, verdict.num_nodes)
            grown = replace(now, tokens=tokens, length=length + verdict.num_nodes)
            believed = drafter.observe(params, believed, grown, Outcome(new, output, verdict))
            # Back to where it started, or the buffer would fill up.
            full = grown.length >= tokens.shape[1] - depth
            length = jnp.where(full, state.context.length, grown.length)
            return believed, tokens, length

        return body

    def known(inputs: tuple, now: Context, new: Draft) -> ModelOutput:
        # Tied to the round, or what a drafter makes of it would be computed once for all rounds.
        output, _ = lax.optimization_barrier((inputs[1], (now.length, new.tokens)))
        return output

    def scored(inputs: tuple, now: Context, new: Draft) -> ModelOutput:
        output, _ = score(inputs[0].target, now, new)
        return replace(output, logits=output.logits + nothing(output.logits))

    def read(inputs: PyTree, carry: tuple) -> tuple:
        count, one = carry
        total = sum((weights * one).sum() for weights in jax.tree.leaves(inputs))
        zero = jnp.isnan(total).astype(jnp.int32)
        return count + zero, one + zero

    def read_and_draft(inputs: tuple, carry: tuple) -> tuple:
        weights, drafting_inputs = inputs
        reading, (believed, tokens, length) = carry
        reading = read(weights, reading)
        believed, tokens, length = drafting(known)(
            drafting_inputs, (believed, tokens, length + reading[0])
        )
        return (reading[0], reading[1] + nothing(length)), (believed, tokens, length)

    def pass_choose(inputs: tuple, carry: Array) -> Array:
        assert choose is not None
        logits, context = inputs
        for level in range(1, depth + 1):  # one after another, as drafting is
            tokens, probs = choose.draw(
                keys, replace(context, length=context.length + carry), level, logits + carry, 1
            )
            carry = carry + nothing(tokens)
            if probs is not None:
                carry = carry + nothing(probs)
        return carry

    def pass_warp(inputs: tuple, carry: Array) -> Array:
        logits, how = inputs
        return carry + nothing(sampling.warp(logits + carry, how))

    def judging(reveal: Callable[[Array, Array, Sampling], Array]) -> Callable:
        """The verifier on the warped logits that `reveal` makes of what it is given."""

        def body(inputs: tuple, carry: Array) -> Array:
            params, context, draft, output, given = inputs
            context = replace(context, length=context.length + carry)
            verdict = verifier.verify(
                params,
                keys,
                context,
                guess(draft.tokens + carry, draft.probs),
                output,
                reveal(given, carry, context.sampling),
            )
            used = nothing(verdict.path) + nothing(verdict.num_nodes)
            return carry + used + nothing(verdict.next_token)

        return body

    def warped_before(given: Array, carry: Array, how: Sampling) -> Array:
        del how
        return given + carry

    def warped_now(given: Array, carry: Array, how: Sampling) -> Array:
        return sampling.warp(given + carry, how)

    def pass_noise(inputs: Keys, carry: Array) -> Array:
        position = context.length[:, None] + carry + jnp.arange(depth + 1)
        return carry + nothing(sampling.shared_gumbel(inputs, position, target.vocab_size))

    def pass_absorb(inputs: tuple, carry: Context) -> Context:
        block, tokens = inputs
        count = jnp.ones(rows, jnp.int32) + nothing(carry.tokens[:, 0])
        new = replace(
            carry,
            tokens=caches.write(carry.tokens, tokens, carry.length, count),
            length=carry.length + count,
            cache=caches.commit(carry.cache, block, path, count),
        )
        full = new.length >= carry.tokens.shape[1] - depth
        length = jnp.where(full, context.length, new.length)
        return replace(new, length=length, cache=replace(new.cache, length=length - 1))

    zero, one = jnp.int32(0), jnp.float32(1)
    logits = output.logits[:, :1]
    small = replace(context, cache=Cache((), (), context.cache.length))  # not read by these parts
    judged = (params, small, draft, output)
    drafted = (
        (params, output, context.cache),
        (state.drafter, context.tokens, context.length),
    )
    found: dict[str, Part] = {
        "target": (pass_target, (params.target, context), (draft.tokens, context.length)),
        "drafter": (drafting(known), *drafted),
        _READ: (read, params.target, (zero, one)),
        _READ_AND_DRAFT: (
            read_and_draft,
            (params.target, drafted[0]),
            ((zero, one), drafted[1]),
        ),
        "target and drafter": (drafting(scored), *drafted),
        "warp": (pass_warp, (output.logits, context.sampling), zero),
        "noise": (pass_noise, keys, zero),
        "verify": (judging(warped_before), (*judged, warped), zero),
        "warp and verify": (judging(warped_now), (*judged, output.logits), zero),
        "absorb": (pass_absorb, (block, draft.tokens[:, : depth + 1]), context),
    }
    if choose is not None:
        found["choose"] = (pass_choose, (logits, small), zero)
    return found


def reads_law(verify: Callable[[Draft], Verdict], draft: Draft) -> bool:
    """Whether a verdict depends on the laws that a draft's tokens were drawn from."""
    if draft.probs is None:
        return False
    program = jax.make_jaxpr(lambda probs: verify(replace(draft, probs=probs)))(draft.probs).jaxpr
    (law,) = program.invars
    return any(x is law for equation in program.eqns for x in equation.invars)


def _paired(times: Mapping[str, list[float]], figure: Callable[[dict[str, float]], float]) -> float:
    """The median over repeats of a figure of each."""
    repeats = range(len(times["step"]))
    return statistics.median(figure({p: t[i] for p, t in times.items()}) for i in repeats)


# ------------------------------------------------------------------------------------------ results


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    lines = []
    for record in records:
        step = record["milliseconds"]["step"]
        title = (
            f"{record['case']}: temperature {record['temperature']:g}, batch "
            f"{record['batch_size']}, {record['num_nodes']} nodes, "
            f"{record['max_length']} slots, {record['device']}, jax {record['jax']}"
        )
        parts = {}
        for part, value in record["milliseconds"].items():
            if part == _READ:
                parts["drafter, cold"] = record["drafter_cold"]
            elif part != _READ_AND_DRAFT:
                parts[part] = value
        parts["rest"] = record["rest"]
        table = Table("part", box=box.SIMPLE_HEAD)
        table.add_column("ms", justify="right")
        table.add_column("% of step", justify="right")
        lines += [title, "", "| part | ms | % of step |", "| --- | ---: | ---: |"]
        for part, value in parts.items():
            inner = part in _WITHIN
            cells = (f"{'  ' * inner}{part}", f"{value:.3f}", f"{100 * value / step:.1f}")
            table.add_row(*cells, style="dim" if inner else "")
            lines.append("| " + " | ".join(cells) + " |")
        summary = (
            f"step / (target and drafter) {record['overhead']:.3f}, "
            f"step / (target + drafter) {record['overhead_alone']:.3f}, "
            f"step / (target + drafter, cold) {record['overhead_cold']:.3f}"
        )
        lines += ["", summary, ""]
        console.print(title, highlight=False)
        console.print(table)
        console.print(summary, highlight=False)
    (output / "results.md").write_text("\n".join(lines))


if __name__ == "__main__":
    scripts.run(main, "configs/bench/llama_30m.py")
