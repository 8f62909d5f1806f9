"""Measures methods of a config on the same prompts, side by side.

    python decode/benchmark.py                                   # configs/bench/demo.py
    python decode/benchmark.py --config=configs/bench/transformers.py

Every repeat decodes every prompt with one method after another, so that a machine that slows down
slows all of them; figures are medians over repeats, speed-ups medians of each repeat's ratio to the
first method, plain decoding in the same engine. Decoding after the prompt, the prompt itself and
compilation are timed apart. Acceptance is counted in another pass, off the clock. Writes
results.json, results.md and results.png into `config.output`.
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

from specjax import checkpoints, engine, metrics, plots, prompts, sampling, scripts
from specjax.build import build, mentions
from specjax.types import Array, DecodeState, Params


class Method(NamedTuple):
    """One row of the table."""

    name: str
    temperatures: tuple[float, ...]
    about: dict[str, Any]  # drafter, verifier, lossless, and more for the record
    run: Callable[[prompts.Batch, float], metrics.Timing]
    measure: Callable[[Sequence[prompts.Batch], float], dict[str, Any]]  # off the clock
    compiles: bool


def main(c: ConfigDict) -> None:
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
    models = checkpoints.load(c.target, c.draft, c.dtype)
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
            for repeat in range(c.repeats):
                for method in group:
                    label = f"T={temperature:g} repeat {repeat + 1} {method.name}"
                    progress.update(task, description=label)
                    timings[method.name].append([])
                    for batch in batches:
                        timings[method.name][-1].append(method.run(batch, temperature))
                        progress.advance(task)
            for method in group:
                record: dict[str, Any] = {"method": method.name, **method.about}
                record |= {"temperature": temperature, "batch_size": c.batch_size}
                baseline = timings[group[0].name]
                record |= _figures(method, temperature, timings[method.name], baseline)
                record |= acceptance[method.name]
                record["seconds_compile"] = compiled.get(method.name)
                records.append(record)
    _write(c, records, console)
    return records


def _methods(
    c: ConfigDict, models: checkpoints.Checkpoints, batches: Sequence[prompts.Batch]
) -> list[Method]:
    given = {"target": models.target, "draft": models.draft}
    methods = []
    for name, spec in c.methods.items():
        if "peer" in spec:
            paths = {"target_directory": c.target, "draft_directory": c.draft}
            peer = build({**spec.peer, **paths, "batches": batches})
            about = {"drafter": peer.drafter, "verifier": "transformers", "lossless": True}
            method = Method(name, tuple(spec.temperatures), about, peer.run, peer.measure, False)
        else:
            method = _engine_method(name, spec, models, batches, given, c.seed)
        methods.append(method)
    return methods


def _engine_method(
    name: str,
    spec: ConfigDict,
    models: checkpoints.Checkpoints,
    batches: Sequence[prompts.Batch],
    given: dict[str, Any],
    seed: int,
) -> Method:
    """A drafter and a verifier under `engine.decoder`."""
    drafter, verifier = build(spec.drafter, **given), build(spec.verifier, **given)
    decoder = engine.decoder(models.target, drafter, verifier, eos_ids=models.eos_ids)
    drafts = mentions(spec.drafter, "draft")
    params = Params(models.target_params, models.draft_params if drafts else ())
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
        return metrics.summary(jax.tree.map(lambda *x: np.concatenate(x), *counted))

    about = {
        "drafter": spec.drafter.call.split(".")[-1],
        "verifier": spec.verifier.call.split(".")[-1],
        "lossless": decoder.lossless,
        "law": decoder.proposal.law,
        "num_nodes": decoder.proposal.num_nodes,
        "depth": decoder.proposal.depth,
    }
    return Method(name, tuple(spec.temperatures), about, once, measure, True)


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
    if temperature == 0 or method.about["verifier"] == "match":
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


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    """The same figures three times: for programs, for pages and for the terminal."""
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "config.json").write_text(c.to_json_best_effort(indent=1) + "\n")
    plots.speedups(records, output / "results.png")

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    answer = {None: "-", True: "yes", False: "NO"}
    columns = {
        "T": lambda r: f"{r['temperature']:g}",
        "method": lambda r: r["method"] + ("" if r["lossless"] else " (lossy)"),
        "verifier": lambda r: r["verifier"],
        "tok/s": lambda r: number(r["tokens_per_second"], 1),
        "speed-up": lambda r: number(r["speedup"]),
        "per pass": lambda r: number(r["mat"]),
        "accepted": lambda r: number(r["acceptance_rate"]),
        "same": lambda r: answer[r["identical"]],
        "prompt": lambda r: number(r["seconds_prefill"]),
        "compile": lambda r: number(r["seconds_compile"], 1),
    }
    rows = [[cell(record) for cell in columns.values()] for record in records]
    batch_size, repeats = c.batch_size, c.repeats
    title = (
        f"{records[0]['num_prompts']} prompts, {records[0]['tokens']} new tokens, batch "
        f"{batch_size}, medians of {repeats} interleaved repeats, {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}"
    )
    legend = (
        "per pass: tokens per target pass; accepted: share of drafted tokens; same: the tokens of "
        "plain decoding; prompt, compile: seconds apart from tok/s, tokens per second"
    )
    lines = [title, "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows] + ["", legend]
    (output / "results.md").write_text("\n".join(lines) + "\n")
    shown = [i for i, name in enumerate(columns) if name != "verifier"]  # it would not fit
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i in shown:
        table.add_column(list(columns)[i], justify="left" if i == 1 else "right")
    for i, row in enumerate(rows):
        last = i + 1 < len(rows) and records[i]["temperature"] != records[i + 1]["temperature"]
        table.add_row(*(row[j] for j in shown), end_section=last)
    console.print(title, highlight=False)
    console.print(table)
    console.print(f"Written to {output}: results.json, results.md, results.png", highlight=False)


if __name__ == "__main__":
    scripts.run(main, "configs/bench/demo.py")
