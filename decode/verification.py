"""What every rule of verification costs beside one pass of the target.

    python decode/verification.py                       # configs/bench/verification.py

About 2 minutes on two CPU cores. Expect every rule below its bound and, of those that
judge the same draft, the same order of tokens gained in every run.

The target's pass is real, with random weights. What a rule judges is made up: after every string
the target's law is that of a language model's shape, logits exponential with a scale that differs
from string to string (Zipf's law), and the draft's logits are the target's with normal noise added.
`num_drafts` drafts are grown from them by the proposal's own builder, and a rule runs on each in a
compiled loop, with other randomness in every round; what it returns decides, in a way the compiler
cannot see through, the input of its next round. Warping is not part of it.

Repeats of all rules and of the pass are interleaved; the share of the pass is the median over
repeats of the ratio of the two.

    us        microseconds of a verdict, the median over repeats
    share     of the target pass, to be compared with its bound
    tokens    gained by a verdict, the target's own included
    drafted   nodes below the root, fillers not counted

Writes results.json, results.md and results.png into `config.output`.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specjax import plots, sampling, scripts, trees
from specjax.build import build
from specjax.drafters.grow import Builder
from specjax.kernels.vocabulary import softmax
from specjax.models.transformer import TransformerConfig, transformer
from specjax.timing import nothing
from specjax.types import (
    Array,
    Cache,
    Context,
    Draft,
    ModelOutput,
    Params,
    Verifier,
)

_PASS = "target"
_SCALES = (1.1, 3.0)  # of the target's logits; the larger, the surer it is of the next token


class Instance(NamedTuple):
    """One draft and the law it is judged by."""

    draft: Draft
    warped: Array  # [B, N, V]


class Case(NamedTuple):
    """A rule on one proposal's drafts."""

    name: str
    verifier: Verifier
    proposal: str
    temperature: float
    bound: float


def main(c: ConfigDict) -> None:
    run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Measures, writes and prints. Returns the records."""
    cases, builders = _checked(c)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    left = TimeRemainingColumn()
    quiet = not console.is_terminal
    with Progress(*columns, left, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("drafting", total=(len(cases) + 1) * (c.repeats + 1))
        drafts: dict[tuple[str, float], list[Instance]] = {}
        for case in cases:
            kind = (case.proposal, case.temperature)
            if kind not in drafts:
                progress.update(task, description=f"drafting {case.proposal}")
                drafts[kind] = _drafts(c, builders[case.proposal], case.temperature)
        timers = {_PASS: _timed_pass(c)}
        for case in cases:
            instances = drafts[case.proposal, case.temperature]
            timers[case.name] = _timed_rule(c, case, instances)
        rounds = {}
        for name, timer in timers.items():
            progress.update(task, description=f"compiling {name}")
            rounds[name] = _rounds(timer, c.seconds)
            progress.advance(task)
        found: dict[str, list[Timing]] = {name: [] for name in timers}
        for repeat in range(c.repeats):
            for name, timer in timers.items():
                progress.update(task, description=f"repeat {repeat + 1}: {name}")
                found[name].append(timer(rounds[name]))
                progress.advance(task)
    records = [_record(c, case, drafts, found) for case in cases]
    _write(c, records, found[_PASS], console)
    return records


def _checked(c: ConfigDict) -> tuple[list[Case], dict[str, Builder]]:
    """The cases and the builders of their proposals, once the config is known to make sense."""
    for name, least in {"repeats": 1, "num_drafts": 1, "batch_size": 1, "num_nodes": 1}.items():
        if c[name] < least:
            raise ValueError(f"{name} is {c[name]}; it must be at least {least}.")
    if c.seconds <= 0 or c.noise < 0:
        raise ValueError(f"seconds is {c.seconds}, noise {c.noise}; need over 0 and at least 0.")
    if not 1 <= c.context_length <= c.max_length - c.num_nodes:
        raise ValueError(
            f"context_length is {c.context_length}; need 1 to {c.max_length - c.num_nodes}, so "
            f"that {c.num_nodes} more nodes fit into {c.max_length} slots."
        )
    if not c.cases:
        raise ValueError("There are no cases; name at least one.")
    builders, cases = {}, []
    for name, spec in c.cases.items():
        if spec.proposal not in c.proposals:
            raise ValueError(
                f"Case {name!r} judges {spec.proposal!r}; need one of {', '.join(c.proposals)}."
            )
        sampling.sampling(1, spec.temperature)  # refuses what is out of range
        if spec.proposal not in builders:
            builders[spec.proposal] = build(c.proposals[spec.proposal])
        verifier, proposal = build(spec.verifier), builders[spec.proposal].proposal
        if not set(proposal.laws) & set(verifier.laws):
            raise ValueError(
                f"Case {name!r}: the rule is lossless for {', '.join(verifier.laws)} only, but "
                f"{spec.proposal!r} has law {proposal.law!r}."
            )
        cases.append(Case(name, verifier, spec.proposal, spec.temperature, spec.bound))
    return cases, builders


# ------------------------------------------------------------------------------------------- drafts


def _context(c: ConfigDict, temperature: float, cache: Cache) -> Context:
    b = c.batch_size
    return Context(
        tokens=jnp.zeros((b, c.max_length), jnp.int32),
        length=jnp.full([b], c.context_length, jnp.int32),
        limit=jnp.full([b], c.max_length, jnp.int32),
        cache=cache,
        sampling=sampling.sampling(b, temperature),
    )


def _no_cache(c: ConfigDict) -> Cache:
    """Rules do not read it."""
    return Cache((), (), jnp.full([c.batch_size], c.context_length - 1, jnp.int32))


def _laws(strings: Array, vocab_size: int, noise: float) -> tuple[Array, Array]:
    """The target's and the draft's logits [B, W, V] after strings, each named by a key [B, W]."""

    def law(key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key, 3)
        scale = jax.random.uniform(keys[0], (), jnp.float32, *_SCALES)
        p = scale * jax.random.exponential(keys[1], (vocab_size,))
        return p, p + noise * jax.random.normal(keys[2], (vocab_size,))

    return jax.vmap(jax.vmap(law))(strings)


def _longer(strings: Array, tokens: Array) -> Array:
    return jax.vmap(jax.vmap(jax.random.fold_in))(strings, tokens)


def _drafts(c: ConfigDict, builder: Builder, temperature: float) -> list[Instance]:
    """Drafts grown by the builder from the laws above, and the target's laws of their nodes."""
    b, vocab_size = c.batch_size, c.target.vocab_size
    context = _context(c, temperature, _no_cache(c))

    @jax.jit
    def draw(key: Array) -> Instance:
        root = jax.random.split(jax.random.fold_in(key, 0), (b, 1))
        rng_keys = sampling.streams(jax.random.split(jax.random.fold_in(key, 1), b))

        def expand(
            strings: Array, tokens: Array, parents: Array, mask: Array, depth: int
        ) -> tuple[Array, Array]:
            del mask, depth
            above = jnp.take_along_axis(strings, parents, 1)
            strings = _longer(above, tokens)
            return _laws(strings, vocab_size, c.noise)[1], strings

        logits = _laws(root, vocab_size, c.noise)[1][:, 0]
        draft = builder.grow(expand, rng_keys, context, logits, root)
        strings = jnp.broadcast_to(root, draft.tokens.shape)
        for _ in range(draft.depth):  # one level more gets its name
            above = jnp.take_along_axis(strings, jnp.maximum(draft.parents, 0), 1)
            strings = jnp.where(draft.parents < 0, root, _longer(above, draft.tokens))
        p, _ = _laws(strings, vocab_size, c.noise)
        return Instance(draft, sampling.warp(p, context.sampling))

    return [draw(key) for key in jax.random.split(jax.random.key(c.seed), c.num_drafts)]


def _overlap(instance: Instance) -> float:
    """Mean over first children of the mass that their law q shares with the target's p."""
    draft, warped = instance
    if draft.probs is None:
        return float("nan")
    p = softmax(warped)
    p = jnp.take_along_axis(p, jnp.maximum(draft.parents, 0)[..., None], 1)
    elder = draft.parents[:, :, None] == draft.parents[:, None, :]
    node = jnp.arange(draft.tokens.shape[1])
    first = ~(elder & (node < node[:, None])).any(-1) & (node > 0)
    shared = jnp.minimum(p, draft.probs).sum(-1)
    return float(jnp.where(first, shared, 0).sum() / first.sum())


# ------------------------------------------------------------------------------------------- timing


class Timing(NamedTuple):
    """One repeat."""

    seconds: float  # of a round
    tokens: float  # gained by a verdict, a mean over rows


Timer = Callable[[int], Timing]  # rounds -> how long each took


def _touched(x: Array, first: Array, zero: Array) -> Array:
    """x, whose first entry is `first`, unless `zero` is not 0: written in place."""
    entry = jnp.reshape(first + zero.astype(x.dtype), (1,) * x.ndim)
    return lax.dynamic_update_slice(x, entry, (0,) * x.ndim)


def _timed_pass(c: ConfigDict) -> Timer:
    """The target's pass over a tree of `num_nodes` nodes."""
    target = transformer(TransformerConfig(**c.target))
    params = jax.jit(target.init)(jax.random.key(c.seed))
    b, n = c.batch_size, c.num_nodes
    cache = target.init_cache(b, c.max_length)
    cache = replace(cache, length=jnp.full([b], c.context_length - 1, jnp.int32))
    parents = jnp.asarray([[-1, *(i // 2 for i in range(n - 1))]] * b, jnp.int32)
    mask = trees.ancestor_mask(parents)

    @jax.jit
    def rounds(count: Array, params: Any, cache: Cache, tokens: Array) -> Array:
        def body(_: Array, tokens: Array) -> Array:
            positions = cache.length[:, None] + trees.depths(mask)
            output, _ = target.apply(params, tokens, positions, mask, cache)
            return tokens + nothing(output.logits)

        return lax.fori_loop(0, count, body, tokens)

    def timer(count: int) -> Timing:
        start = time.perf_counter()
        jax.block_until_ready(rounds(count, params, cache, jnp.ones((b, n), jnp.int32)))
        return Timing((time.perf_counter() - start) / count, float("nan"))

    return timer


def _timed_rule(c: ConfigDict, case: Case, instances: list[Instance]) -> Timer:
    """The rule on each draft in turn, `count` rounds in all."""
    context = _context(c, case.temperature, _no_cache(c))
    rng_keys = sampling.streams(jax.random.split(jax.random.key(c.seed + 1), c.batch_size))
    # The parents are constants, as they are where a builder makes them, unless drafts differ.
    parents = jax.device_get(instances[0].draft.parents)
    fixed = all((jax.device_get(x.draft.parents) == parents).all() for x in instances)

    @jax.jit
    def rounds(start: Array, count: Array, first: Instance) -> Array:
        def body(i: Array, carry: tuple) -> tuple:
            draft, warped, gained = carry
            now = replace(context, length=context.length + i)
            tree = jnp.asarray(parents) if fixed else draft.parents
            verdict = case.verifier.verify(
                Params(()),
                rng_keys,
                now,
                replace(draft, parents=tree),
                ModelOutput(warped, warped),
                warped,
            )
            zero = nothing(verdict.path) + nothing(verdict.num_nodes)
            zero += nothing(verdict.next_token)
            draft = replace(draft, tokens=draft.tokens + zero)
            if first.draft.probs is not None:
                probs = _touched(draft.probs, first.draft.probs[0, 0, 0], zero)
                draft = replace(draft, probs=probs)
            warped = _touched(warped, first.warped[0, 0, 0], zero)
            return draft, warped, gained + verdict.num_nodes.sum()

        stop = start + count
        return lax.fori_loop(start, stop, body, (*first, jnp.int32(0)))[2]

    rounds_so_far = 0

    def timer(count: int) -> Timing:
        nonlocal rounds_so_far
        each = -(-count // len(instances))
        seconds, gained = 0.0, 0
        for instance in instances:
            started = time.perf_counter()
            tokens = jax.block_until_ready(rounds(rounds_so_far, each, instance))
            seconds += time.perf_counter() - started
            gained += int(tokens)
        rounds_so_far += each
        total = each * len(instances)
        return Timing(seconds / total, gained / total / c.batch_size)

    return timer


def _rounds(timer: Timer, seconds: float) -> int:
    """How many rounds take about so long."""
    timer(1)
    count, taken = 2, 0.0
    while taken < seconds / 2:
        taken = count * timer(count).seconds
        count = max(2, int(count * min(seconds / taken, 100)))
    return count


# ------------------------------------------------------------------------------------------ results


def _record(
    c: ConfigDict,
    case: Case,
    drafts: Mapping[tuple[str, float], list[Instance]],
    found: Mapping[str, list[Timing]],
) -> dict[str, Any]:
    instances, timings = drafts[case.proposal, case.temperature], found[case.name]
    pairs = zip(timings, found[_PASS], strict=True)
    drafted = [float(x.draft.num_drafted.mean()) for x in instances]
    overlaps = [_overlap(x) for x in instances]
    return {
        "case": case.name,
        "proposal": case.proposal,
        "temperature": case.temperature,
        "lossless": case.verifier.lossless,
        "bound": case.bound,
        "microseconds": 1e6 * statistics.median(t.seconds for t in timings),
        "share": statistics.median(t.seconds / one.seconds for t, one in pairs),
        "tokens": statistics.fmean(t.tokens for t in timings),
        "drafted": statistics.fmean(drafted),
        "overlap": None if instances[0].draft.probs is None else statistics.fmean(overlaps),
        "pass_microseconds": 1e6 * statistics.median(t.seconds for t in found[_PASS]),
        "batch_size": c.batch_size,
        "num_nodes": c.num_nodes,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _write(
    c: ConfigDict, records: list[dict[str, Any]], passes: list[Timing], console: Console
) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    first = records[0]
    title = (
        f"One target pass over {first['num_nodes']} nodes takes "
        f"{first['pass_microseconds'] / 1e3:.2f} ms; batch {first['batch_size']}, "
        f"{first['device']}, jax {first['jax']}"
    )
    names = ("T", "us", "share %", "bound %", "tokens", "drafted", "overlap")
    table = Table("rule", *names, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    lines = [title, "", "| rule | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for r in records:
        cells = (
            r["case"],
            f"{r['temperature']:g}",
            f"{r['microseconds']:.0f}",
            f"{100 * r['share']:.1f}",
            f"{100 * r['bound']:g}",
            f"{r['tokens']:.3f}",
            f"{r['drafted']:.1f}",
            "-" if r["overlap"] is None else f"{r['overlap']:.2f}",
        )
        table.add_row(*cells, style="" if r["share"] <= r["bound"] else "red")
        lines.append("| " + " | ".join(cells) + " |")
    (output / "results.md").write_text("\n".join(lines) + "\n")
    plots.costs(records, output / "results.png")
    console.print(title, highlight=False)
    console.print(table)


if __name__ == "__main__":
    scripts.run(main, "configs/bench/verification.py")
