"""Measures methods of a config on the same prompts, side by side.

    python decode/benchmark.py                                   # configs/bench/demo.py
    python decode/benchmark.py --config=configs/bench/transformers.py

Every repeat decodes every prompt with one method after another, so that a machine that slows down
slows all of them; figures are medians over repeats, speed-ups medians of each repeat's ratio to the
first method, plain decoding in the same engine. Decoding after the prompt, the prompt itself and
compilation are timed apart. Acceptance is counted in another pass, off the clock, and the pairs of
methods in `config.comparisons` are compared prompt by prompt. A method's `formula`, a function of
`theory`, tells what to expect of its first drafted token. With `config.costs`, seconds, the passes
of every method's step are timed as well, each for so long in as many repeats, side by side with the
first method's, and `theory` predicts the speed-up from them and from the acceptance. All of it is
done for each of `config.batch_sizes`. Writes results.json, results.md and results.png into
`config.output`. A config with a `benchmark` names the function that runs it instead.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
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
from specjax.types import Array, DecodeState, Drafter, Proposal

_TARGET, _DRAFTER, _BOTH = _PASSES = ("target", "drafter", "target and drafter")


class Method(NamedTuple):
    """One row of the table."""

    name: str
    temperatures: tuple[float, ...]
    about: dict[str, Any]  # drafter, verifier, what they promise, and more for the record
    run: Callable[[prompts.Batch, float], metrics.Timing]
    measure: Callable[[Sequence[prompts.Batch], float], dict[str, Any]]  # off the clock
    # A step's passes; None where they cannot be told apart: of a peer, of what switches decoders.
    costs: Callable[[float], dict[str, Timed]] | None
    compiles: bool = True  # no peer


def main(c: ConfigDict) -> None:
    if "benchmark" in c:  # a config that asks something else of the engine
        build({"call": c.benchmark, "c": c})
    else:
        run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Benchmarks, writes and prints. Returns the records."""
    console = Console()
    for name, values in (("temperatures", c.temperatures), ("batch_sizes", c.batch_sizes)):
        if c.repeats < 1 or not values:
            raise ValueError(
                f"repeats is {c.repeats} and {name} {tuple(values)}; need at least 1 of each."
            )
    for temperature in c.temperatures:
        sampling.sampling(1, temperature)  # refuses what is out of range
    specs = [m.get(part) for m in c.methods.values() for part in ("drafter", "decoder", "weights")]
    drafts = {n: path for n, path in c.drafts.items() if any(mentions(spec, n) for spec in specs)}
    models = checkpoints.load(c.target, drafts, c.dtype, c.cache_dtype)
    if c.prompts:
        tokens = prompts.encode(prompts.read(c.prompts), models.tokenizer)[: c.num_prompts]
    else:
        tokens = prompts.held_out(models.tokenizer, c.num_prompts, c.prompt_length, c.seed)
    sized = [prompts.batches(tokens, b, c.max_new_tokens, models.context) for b in c.batch_sizes]
    planned = [(batches, _methods(c, models, batches)) for batches in sized]
    _check(c, planned[0][1])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    left = TimeRemainingColumn()
    records: list[dict[str, Any]] = []
    quiet = not console.is_terminal
    with Progress(*columns, left, console=console, transient=True, disable=quiet) as progress:
        pairs = sum(len(method.temperatures) for method in planned[0][1])
        passes = pairs * (c.repeats + 1) * sum(map(len, sized))
        task = progress.add_task("compiling", total=passes)

        def show(done: int, now: str) -> None:
            progress.update(task, advance=done, description=now)

        for batches, methods in planned:
            compiled: dict[str, float] = {}
            for temperature in c.temperatures:
                group = [method for method in methods if temperature in method.temperatures]
                records += _run_group(c, group, batches, temperature, compiled, show)
                _save(c, records)  # as far as it has come
            jax.clear_caches()  # many live programs exhaust the memory reserved for code
    _write(c, records, console)
    return records


def _check(c: ConfigDict, methods: Sequence[Method]) -> None:
    """Refuses temperatures without a baseline and comparisons of what is not there."""
    groups = [[m for m in methods if t in m.temperatures] for t in c.temperatures]
    for temperature, group in zip(c.temperatures, groups, strict=True):
        if not group or group[0] is not methods[0]:
            raise ValueError(
                f"Temperature {temperature} has no baseline; the first method, "
                f"{methods[0].name!r}, must list it."
            )
    for pair in c.get("comparisons", ()):
        if not any(set(pair) <= {m.name for m in group if m.compiles} for group in groups):
            raise ValueError(
                f"Comparison {tuple(pair)} does not name two methods of this engine at one "
                f"temperature; there are {', '.join(m.name for m in methods if m.compiles)}."
            )


def _run_group(
    c: ConfigDict,
    group: Sequence[Method],
    batches: Sequence[prompts.Batch],
    temperature: float,
    compiled: dict[str, float],
    show: Callable[[int, str], None],
) -> list[dict[str, Any]]:
    """The records of one temperature and batch size, the baseline's first.

    Args:
        c: the config.
        group: methods, the baseline first.
        batches: what they decode.
        temperature: of all rows.
        compiled: seconds of compilation by method, to read and to add to.
        show: (passes done, what is going on).
    """
    acceptance = {}
    for method in group:
        show(0, f"compiling {method.name}")
        if method.compiles and method.name not in compiled:
            started = time.perf_counter()
            method.run(batches[0]._replace(limit=batches[0].length + 1), temperature)
            compiled[method.name] = time.perf_counter() - started
        acceptance[method.name] = method.measure(batches, temperature)
        show(len(batches), f"compiling {method.name}")
    timings: dict[str, list[list[metrics.Timing]]] = {m.name: [] for m in group}
    for repeat in range(c.repeats):
        for method in group:
            timings[method.name].append([])
            for batch in batches:
                show(1, f"T={temperature:g} repeat {repeat + 1} {method.name}")
                timings[method.name][-1].append(method.run(batch, temperature))
    records = []
    baseline = timings[group[0].name]
    for method in group:
        record: dict[str, Any] = {"method": method.name, **method.about}
        record |= {"temperature": temperature, "batch_size": len(batches[0].length)}
        record |= _figures(method, temperature, timings[method.name], baseline)
        record |= acceptance[method.name]
        record["seconds_compile"] = compiled.get(method.name)
        records.append(record)
    if seconds := c.get("costs", 0):
        show(0, f"T={temperature:g} costs")
        _add_costs(records, group, temperature, seconds, c.repeats)
    _compare([tuple(pair) for pair in c.get("comparisons", ())], records)
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
            method = Method(
                name, tuple(spec.temperatures), about, peer.run, peer.measure, None, compiles=False
            )
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
    """A drafter and a verifier under `engine.decoder`, or a decoder that joins others."""
    given = checkpoints.given(models.target, models.drafts)
    verifier = build(spec.verifier, **given)
    drafter: Drafter | None = None
    if "decoder" in spec:
        decoder = build(spec.decoder, **given, eos_ids=models.eos_ids)
    else:
        drafter = build(spec.drafter, **given)
        decoder = engine.decoder(models.target, drafter, verifier, eos_ids=models.eos_ids)
    drafting = spec.decoder if drafter is None else spec.drafter
    law, num_nodes, depth = decoder.proposal
    formula = None if drafter is None else _formula(name, spec, decoder.proposal)
    params = checkpoints.params(
        models.target_params, models.drafts, drafting, spec.get("weights"), models.target
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
        if drafter is not None and formula:
            found = [
                metrics.first_tokens(drafter, decoder, params, prefill(batch, temperature), formula)
                for batch in batches
            ]
            joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
            figures["first_token"] = {"formula": spec.formula, **metrics.agreement(joined)}
        return figures

    about = {
        "drafter": drafting.call.split(".")[-1],
        "verifier": spec.verifier.call.split(".")[-1],
        "lossless": decoder.lossless,
        "drafter_invariant": decoder.drafter_invariant,
        "law": law,
        "num_nodes": num_nodes,
        "depth": depth,
    }

    def costs(temperature: float) -> dict[str, Timed]:
        from decode.profile import parts_of  # `scripts.run` has made it known by now

        assert drafter is not None
        state = prefill(batches[0], temperature)
        parts = parts_of(models.target, drafter, verifier, None, params, state)
        return {part: loop(*parts[part]) for part in _PASSES}

    told = None if drafter is None else costs
    return Method(name, tuple(spec.temperatures), about, once, measure, told)


def _add_costs(
    records: Sequence[dict[str, Any]],
    methods: Sequence[Method],
    temperature: float,
    seconds: float,
    repeats: int,
) -> None:
    """Adds to the records what the passes of each method's step take beside the first one's.

    Medians over repeats in milliseconds and in passes of plain decoding, and the speed-up that they
    promise with the acceptance measured. One method's programs are there at a time, besides the
    baseline's.
    """

    def sized(method: Method) -> dict[str, tuple[Timed, int]]:
        assert method.costs is not None
        loops = method.costs(temperature).items()
        return {part: (timed, rounds(timed, seconds)) for part, timed in loops}

    def passes(loops: dict[str, tuple[Timed, int]]) -> dict[str, float]:
        return {part: timed(n) / n for part, (timed, n) in loops.items()}

    baseline = sized(methods[0])
    for method, record in zip(methods, records, strict=True):
        if method.costs is None:
            continue
        is_baseline = method is methods[0]
        loops = baseline if is_baseline else sized(method)
        found = [(passes(loops), passes(baseline)) for _ in range(repeats)]
        verify = statistics.median(own[_TARGET] / plain[_TARGET] for own, plain in found)
        draft = statistics.median(
            (own[_BOTH] - own[_TARGET]) / plain[_TARGET] for own, plain in found
        )
        if is_baseline:
            draft, verify = 0.0, 1.0
        predicted = theory.speedup(record["mat"], max(draft, 0.0), verify)
        record |= {
            "milliseconds": {
                part: statistics.median(1e3 * own[part] for own, _ in found) for part in _PASSES
            },
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


def _save(c: ConfigDict, records: list[dict[str, Any]]) -> Path:
    """Writes the figures and the config into `config.output`, which it returns."""
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "config.json").write_text(c.to_json_best_effort(indent=1) + "\n")
    return output


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    """The same figures three times: for programs, for pages and for the terminal."""
    output = _save(c, records)
    plots.speedups(records, output / "results.png")
    sizes = " and ".join(map(str, c.batch_sizes))
    title = (
        f"{records[0]['num_prompts']} prompts, {records[0]['tokens']} new tokens, batch {sizes}, "
        f"medians of {c.repeats} interleaved repeats, {jax.devices()[0].device_kind}, "
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
        # Without what would not fit, and what is the same everywhere.
        left_out = {"verifier"} | ({"B"} if len(c.batch_sizes) == 1 else set())
        shown = [name for name in rows[0] if name not in left_out]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in shown:
            is_name = name in ("method", "over")
            table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name)
        for i, row in enumerate(rows):
            last = i + 1 < len(rows) and any(row[x] != rows[i + 1][x] for x in ("B", "T"))
            table.add_row(*(row[name] for name in shown), end_section=last)
        console.print(table)
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"Written to {output}: results.json, results.md, results.png", highlight=False)


def _speeds(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], str]:
    """The table of all methods, each row by column, and its legend."""
    answer = {None: "-", True: "yes", False: "NO"}
    rows = [
        {
            "B": f"{r['batch_size']}",
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
            "B": f"{r['batch_size']}",
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
            "B": f"{r['batch_size']}",
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
            "B": f"{r['batch_size']}",
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
