"""Measures methods of a config on the same prompts, side by side.

    python decode/benchmark.py                                   # configs/bench/demo.py
    python decode/benchmark.py --config=configs/bench/transformers.py

Every repeat decodes every prompt with one method after another, so that a machine that slows down
slows all of them; figures are medians over repeats, speed-ups medians of each repeat's ratio to the
first method, plain decoding in the same engine. Decoding after the prompt, the prompt itself and
compilation are timed apart. Acceptance is counted in another pass, off the clock, and the pairs of
methods in `config.comparisons` are compared prompt by prompt. A method's `formula`, a function of
`theory`, tells what to expect of its first drafted token. With `config.costs`, seconds, the passes
of every method's step are timed as well, each for so long in every repeat, and `theory` predicts
the speed-up from them and from the acceptance. Writes results.json, results.md and results.png into
`config.output`. A config with a `benchmark` names the function that runs it instead.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specjax import checkpoints, engine, metrics, plots, prompts, sampling, scripts, theory
from specjax.build import build, mentions
from specjax.timing import Timed, loop, rounds
from specjax.types import Array, DecodeState, Proposal

_TARGET, _DRAFTER, _BOTH = _PASSES = ("target", "drafter", "target and drafter")


class Method(NamedTuple):
    """One row of the table."""

    name: str
    temperatures: tuple[float, ...]
    about: dict[str, Any]  # drafter, verifier, what they promise, and more for the record
    run: Callable[[prompts.Batch, float], metrics.Timing]
    measure: Callable[[Sequence[prompts.Batch], float], dict[str, Any]]  # off the clock
    costs: Callable[[float], dict[str, Timed]] | None  # a step's passes; None for a peer

    @property
    def compiles(self) -> bool:
        return self.costs is not None


def main(c: ConfigDict) -> None:
    if "benchmark" in c:  # a config that asks something else of the engine
        build({"call": c.benchmark, "c": c})
    else:
        run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Benchmarks, writes and prints. Returns the records."""
    console = Console()
    if c.repeats < 1 or not c.temperatures:
        raise ValueError(
            f"repeats is {c.repeats} and temperatures {tuple(c.temperatures)}; need at least 1."
        )
    for temperature in c.temperatures:
        sampling.sampling(1, temperature)  # refuses what is out of range
    specs = [method.get(part) for method in c.methods.values() for part in ("drafter", "weights")]
    drafts = {n: path for n, path in c.drafts.items() if any(mentions(spec, n) for spec in specs)}
    models = checkpoints.load(c.target, drafts, c.dtype, c.cache_dtype)
    if c.prompts:
        tokens = prompts.encode(prompts.read(c.prompts), models.tokenizer)[: c.num_prompts]
    else:
        tokens = prompts.held_out(models.tokenizer, c.num_prompts, c.prompt_length, c.seed)
    batches = prompts.batches(tokens, c.batch_size, c.max_new_tokens, models.context)
    methods = _methods(c, models, batches)
    groups = [(t, [m for m in methods if t in m.temperatures]) for t in c.temperatures]
    for temperature, group in groups:
        if not group or group[0] is not methods[0]:
            raise ValueError(
                f"Temperature {temperature} has no baseline; the first method, "
                f"{methods[0].name!r}, must list it."
            )
    pairs = [tuple(pair) for pair in c.get("comparisons", ())]
    for pair in pairs:
        if not any(set(pair) <= {m.name for m in group if m.compiles} for _, group in groups):
            raise ValueError(
                f"Comparison {pair} does not name two methods of this engine at one temperature; "
                f"there are {', '.join(m.name for m in methods if m.compiles)}."
            )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    left = TimeRemainingColumn()
    records: list[dict[str, Any]] = []
    compiled: dict[str, float] = {}
    quiet = not console.is_terminal
    with Progress(*columns, left, console=console, transient=True, disable=quiet) as progress:
        passes = sum(len(group) for _, group in groups) * (c.repeats + 1) * len(batches)
        task = progress.add_task("compiling", total=passes)
        for temperature, group in groups:
            acceptance = {}
            for method in group:
                progress.update(task, description=f"compiling {method.name}")
                if method.compiles and method.name not in compiled:
                    started = time.perf_counter()
                    method.run(batches[0]._replace(limit=batches[0].length + 1), temperature)
                    compiled[method.name] = time.perf_counter() - started
                acceptance[method.name] = method.measure(batches, temperature)
                progress.advance(task, len(batches))
            timings: dict[str, list[list[metrics.Timing]]] = {m.name: [] for m in group}
            costs = _Costs(group, temperature, c.get("costs", 0))
            for repeat in range(c.repeats):
                for method in group:
                    label = f"T={temperature:g} repeat {repeat + 1} {method.name}"
                    progress.update(task, description=label)
                    timings[method.name].append([])
                    for batch in batches:
                        timings[method.name][-1].append(method.run(batch, temperature))
                        progress.advance(task)
                    costs.measure(method.name)
            for method in group:
                record: dict[str, Any] = {"method": method.name, **method.about}
                record |= {"temperature": temperature, "batch_size": c.batch_size}
                baseline = timings[group[0].name]
                record |= _figures(method, temperature, timings[method.name], baseline)
                record |= acceptance[method.name]
                record["seconds_compile"] = compiled.get(method.name)
                record |= costs.figures(method.name, group[0].name, record)
                records.append(record)
            _compare(pairs, records[-len(group) :])
    _write(c, records, console)
    return records


def _methods(
    c: ConfigDict, models: checkpoints.Checkpoints, batches: Sequence[prompts.Batch]
) -> list[Method]:
    methods = []
    for name, spec in c.methods.items():
        if "peer" in spec:
            paths = {"target_directory": c.target, "draft_directory": c.drafts.get("draft", "")}
            peer = build({**spec.peer, **paths, "batches": batches})
            about = {"drafter": peer.drafter, "verifier": "transformers"}
            about |= {"lossless": True, "drafter_invariant": False}
            method = Method(name, tuple(spec.temperatures), about, peer.run, peer.measure, None)
        else:
            method = _engine_method(name, spec, models, batches, c.seed)
        methods.append(method)
    return methods


def _engine_method(
    name: str,
    spec: ConfigDict,
    models: checkpoints.Checkpoints,
    batches: Sequence[prompts.Batch],
    seed: int,
) -> Method:
    """A drafter and a verifier under `engine.decoder`."""
    given = checkpoints.given(models.target, models.drafts)
    drafter, verifier = build(spec.drafter, **given), build(spec.verifier, **given)
    decoder = engine.decoder(models.target, drafter, verifier, eos_ids=models.eos_ids)
    law, num_nodes, depth = decoder.proposal
    formula = _formula(name, spec, decoder.proposal)
    params = checkpoints.params(
        models.target_params, models.drafts, spec.drafter, spec.get("weights"), models.target
    )
    max_length = prompts.max_length(batches)

    def prefill(batch: prompts.Batch, temperature: float) -> DecodeState:
        return jax.block_until_ready(
            engine.prefill(
                decoder,
                params,
                rng_keys(seed, batch.which),
                sampling.sampling(len(batch.length), temperature),
                jnp.asarray(batch.tokens),
                jnp.asarray(batch.length),
                jnp.asarray(batch.limit),
                max_length,
            )
        )

    def once(batch: prompts.Batch, temperature: float) -> metrics.Timing:
        start = time.perf_counter()
        state = prefill(batch, temperature)
        middle = time.perf_counter()
        state = jax.block_until_ready(engine.advance(decoder, params, state, max_length))
        end = time.perf_counter()
        tokens = continuations(batch, state)
        return metrics.Timing(tokens, sum(map(len, tokens)), end - middle, middle - start)

    def measure(batches: Sequence[prompts.Batch], temperature: float) -> dict[str, Any]:
        counted = [
            metrics.measure(decoder, params, prefill(batch, temperature), max_length)[1]
            for batch in batches
        ]
        figures = metrics.summary(jax.tree.map(lambda *x: np.concatenate(x), *counted))
        if formula:
            found = [
                metrics.first_tokens(drafter, decoder, params, prefill(batch, temperature), formula)
                for batch in batches
            ]
            joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
            figures["first_token"] = {"formula": spec.formula, **metrics.agreement(joined)}
        return figures

    about = {
        "drafter": spec.drafter.call.split(".")[-1],
        "verifier": spec.verifier.call.split(".")[-1],
        "lossless": decoder.lossless,
        "drafter_invariant": verifier.drafter_invariant,
        "law": law,
        "num_nodes": num_nodes,
        "depth": depth,
    }

    def costs(temperature: float) -> dict[str, Timed]:
        from decode.profile import parts_of  # `scripts.run` has made it known by now

        state = prefill(batches[0], temperature)
        parts = parts_of(models.target, drafter, verifier, None, params, state)
        return {part: loop(*parts[part]) for part in _PASSES}

    return Method(name, tuple(spec.temperatures), about, once, measure, costs)


class _Costs:
    """Seconds of the passes of each method's step, in as many repeats as it is measured."""

    def __init__(self, methods: Sequence[Method], temperature: float, seconds: float) -> None:
        self._loops: dict[str, dict[str, tuple[Timed, int]]] = {}
        self._found: dict[str, list[dict[str, float]]] = {}
        for method in methods if seconds else ():
            if method.costs is not None:
                loops = method.costs(temperature)
                sized = {part: (timed, rounds(timed, seconds)) for part, timed in loops.items()}
                self._loops[method.name], self._found[method.name] = sized, []

    def measure(self, name: str) -> None:
        if name in self._loops:
            parts = self._loops[name].items()
            self._found[name].append({part: timed(n) / n for part, (timed, n) in parts})

    def figures(self, name: str, baseline: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Medians in milliseconds; the speed-up they promise with the acceptance measured."""
        if name not in self._loops:
            return {}

        def median(figure: Callable[[dict[str, float], dict[str, float]], float]) -> float:
            both = zip(self._found[name], self._found[baseline], strict=True)
            return statistics.median(figure(own, plain) for own, plain in both)

        draft = median(lambda own, plain: (own[_BOTH] - own[_TARGET]) / plain[_TARGET])
        verify = median(lambda own, plain: own[_TARGET] / plain[_TARGET])
        if name == baseline:
            draft = 0.0
        predicted = theory.speedup(record["mat"], max(draft, 0.0), verify)
        of_pass = {p: [1e3 * seconds[p] for seconds in self._found[name]] for p in _PASSES}
        return {
            "milliseconds": {p: statistics.median(found) for p, found in of_pass.items()},
            "draft_cost": draft,
            "verify_cost": verify,
            "predicted": predicted,
            "of_predicted": record["speedup"] / predicted,
        }


def _formula(name: str, spec: ConfigDict, proposal: Proposal) -> Callable | None:
    """The function of `theory` that a method names, if it does."""
    if "formula" not in spec:
        return None
    found = getattr(theory, spec.formula, None)
    if found is None:
        raise ValueError(f"Method {name!r} has formula {spec.formula!r}; theory has none of it.")
    law, num_nodes, depth = proposal
    if law not in ("chain", "coupled") or num_nodes != depth + 1:
        raise ValueError(
            f"Method {name!r} has formula {spec.formula!r} for the first token of a sampled chain, "
            f"but it drafts {num_nodes} nodes of law {law!r}, {depth} deep."
        )
    return found


def rng_keys(seed: int, which: np.ndarray) -> Array:
    """A key for each prompt, whatever batch it is in."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(which))


def continuations(batch: prompts.Batch, state: DecodeState) -> list[np.ndarray]:
    """What each row's prompt was continued with; rows that only pad the batch are left out."""
    tokens, length = np.asarray(state.context.tokens), np.asarray(state.context.length)
    rows = range(len(tokens))
    return [tokens[b, batch.length[b] : length[b]] for b in rows if batch.limit[b] > 1]


def _figures(
    method: Method,
    temperature: float,
    timings: list[list[metrics.Timing]],
    baseline: list[list[metrics.Timing]],
) -> dict[str, Any]:
    """Medians over repeats; each repeat is a list of batches."""

    def rate(repeat: list[metrics.Timing]) -> float:
        return sum(t.num_timed for t in repeat) / sum(t.seconds for t in repeat)

    def whole(repeat: list[metrics.Timing]) -> float:
        seconds = sum(t.seconds + t.seconds_prefill for t in repeat)
        return sum(len(row) for t in repeat for row in t.tokens) / seconds

    def texts(repeat: list[metrics.Timing]) -> list[list[int]]:
        return [row.tolist() for t in repeat for row in t.tokens]

    identical = None
    if temperature == 0 or method.about["drafter_invariant"]:
        identical = all(texts(repeat) == texts(baseline[0]) for repeat in timings)
    ratios = [rate(a) / rate(b) for a, b in zip(timings, baseline, strict=True)]
    return {
        "num_prompts": len(texts(timings[0])),
        "tokens": sum(map(len, texts(timings[0]))),
        "seconds": statistics.median(sum(t.seconds for t in r) for r in timings),
        "seconds_prefill": statistics.median(sum(t.seconds_prefill for t in r) for r in timings),
        "tokens_per_second": statistics.median(map(rate, timings)),
        "tokens_per_second_with_prefill": statistics.median(map(whole, timings)),
        "speedup": statistics.median(ratios),
        "speedup_repeats": ratios,
        "identical": identical,
    }


def _compare(pairs: Sequence[tuple[str, str]], records: Sequence[dict[str, Any]]) -> None:
    """Notes in the records of one temperature by how much they exceed others, `mat_over`."""
    of = {record["method"]: record for record in records}
    for ours, theirs in pairs:
        if ours in of and theirs in of:
            over = of[ours].setdefault("mat_over", {})
            over[theirs] = metrics.difference(of[ours], of[theirs])


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    """The same figures three times: for programs, for pages and for the terminal."""
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "config.json").write_text(c.to_json_best_effort(indent=1) + "\n")
    plots.speedups(records, output / "results.png")
    batch_size, repeats = c.batch_size, c.repeats
    title = (
        f"{records[0]['num_prompts']} prompts, {records[0]['tokens']} new tokens, batch "
        f"{batch_size}, medians of {repeats} interleaved repeats, {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}"
    )
    console.print(title, highlight=False)
    lines = [title]
    tables = (_speeds(records), _differences(records), _first_tokens(records))
    for rows, legend in (*tables, _predictions(records)):
        if not rows:
            continue
        lines += ["", "| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join(row.values()) + " |" for row in rows] + ["", legend]
        shown = [name for name in rows[0] if name != "verifier"]  # it would not fit
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in shown:
            is_name = name in ("method", "over")
            table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name)
        for i, row in enumerate(rows):
            last = i + 1 < len(rows) and row["T"] != rows[i + 1]["T"]
            table.add_row(*(row[name] for name in shown), end_section=last)
        console.print(table)
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"Written to {output}: results.json, results.md, results.png", highlight=False)


def _speeds(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], str]:
    """The table of all methods, each row by column, and its legend."""
    answer = {None: "-", True: "yes", False: "NO"}
    rows = [
        {
            "T": f"{r['temperature']:g}",
            "method": r["method"] + ("" if r["lossless"] else " (lossy)"),
            "verifier": r["verifier"],
            "tok/s": _number(r["tokens_per_second"], 1),
            "speed-up": _number(r["speedup"]),
            "per pass": _within(r["mat"], r.get("mat_interval")),
            "accepted": _number(r["acceptance_rate"]),
            "same": answer[r["identical"]],
            "prompt": _number(r["seconds_prefill"]),
            "compile": _number(r["seconds_compile"], 1),
        }
        for r in records
    ]
    legend = (
        "per pass: tokens per target pass, with 95 % intervals; accepted: share of drafted tokens; "
        "same: the tokens of plain decoding; prompt, compile: seconds apart from tok/s, tokens per "
        "second"
    )
    return rows, legend


def _differences(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], str]:
    """The table of compared pairs, likewise."""
    rows = [
        {
            "T": f"{r['temperature']:g}",
            "method": r["method"],
            "over": other,
            "more per pass": _within(found["difference"], found["interval"], 3),
        }
        for r in records
        for other, found in r.get("mat_over", {}).items()
    ]
    return rows, "more per pass: tokens per target pass, prompt by prompt, with 95 % intervals"


def _first_tokens(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], str]:
    """The table of formulas and what came of them, likewise."""
    rows = [
        {
            "T": f"{r['temperature']:g}",
            "method": r["method"],
            "formula": r["first_token"]["formula"],
            "expected": _number(r["first_token"]["expected"], 3),
            "accepted": _number(r["first_token"]["accepted"], 3),
            "difference": _within(r["first_token"]["difference"], r["first_token"]["interval"], 3),
        }
        for r in records
        if "first_token" in r
    ]
    legend = (
        "expected: chance of the first drafted token by the formula, mean of all steps; accepted: "
        "share of the same steps that kept it; the difference with 95 % intervals"
    )
    return rows, legend


def _predictions(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], str]:
    """The table of what `theory` promises, likewise."""
    rows = [
        {
            "T": f"{r['temperature']:g}",
            "method": r["method"],
            "target": _number(r["milliseconds"][_TARGET], 3),
            "both": _number(r["milliseconds"][_BOTH], 3),
            "verify cost": _number(r["verify_cost"]),
            "draft cost": _number(r["draft_cost"]),
            "predicted": _number(r["predicted"]),
            "speed-up": _number(r["speedup"]),
            "of it": f"{100 * r['of_predicted']:.0f} %",
        }
        for r in records
        if "predicted" in r
    ]
    legend = (
        "target, both: milliseconds of a step's target pass, and of the drafter's passes with it; "
        "costs: the same in plain decoding's passes; predicted: tokens per pass over their sum"
    )
    return rows, legend


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _within(value: float | None, interval: Sequence[float] | None, digits: int = 2) -> str:
    half = (interval[1] - interval[0]) / 2 if interval else 0.0
    error = f" ± {half:.{digits}f}".replace(" 0.", " .")
    return _number(value, digits) + (error if half else "")


if __name__ == "__main__":
    scripts.run(main, "configs/bench/demo.py")
