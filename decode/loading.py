"""What loading a checkpoint costs beside reading its bytes, in time and in memory.

    python decode/loading.py                            # configs/bench/loading.py

A random model is made once, in bfloat16. Then, interleaved and after one round that is not counted,

    reading                the bytes of its files into fresh memory, by plain unbuffered reads
    loading                `hf.load` in the stored type
    loading as float32     `hf.load` with a conversion, for which no bound is set

each time in a process of its own: all pay alike for fresh memory, and peaks are their own. Files
are in the system's cache and arrays on the CPU. Seconds are medians over the rounds, and so are
ratios to reading in the same round, beside which stands the ratio of the medians. GB/s are of the
files. Peaks are the largest, of the memory by which a process grows, beside the model's own and
that with its largest tensor; they are known on Linux only.

Writes results.json, results.md and results.png into `config.output`.
"""

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from specjax import plots, scripts
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, transformer

_STATUS = Path("/proc/self/status")


def main(c: ConfigDict) -> None:
    run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Measures, writes and prints. Returns the records."""
    if c.repeats < 1:
        raise ValueError(f"repeats is {c.repeats}; need at least 1.")
    console = Console()
    directory = Path(c.directory)
    make(c, directory, console)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[int]] = {way: [] for way in WAYS}
    with scripts.progress(console) as bars, _processes() as pool:
        task = bars.add_task("", total=(c.repeats + 1) * len(WAYS))
        for repeat in range(c.repeats + 1):
            for way in WAYS:
                bars.update(task, description=f"{way}, round {repeat}" if repeat else "warming up")
                seconds, peak = pool.submit(_measure, way, directory).result()
                bars.advance(task)
                if repeat:
                    times[way].append(seconds)
                    peaks[way] += [] if peak is None else [peak]
    records = _records(c, directory, times, peaks)
    _write(c, directory, records, console)
    return records


# ---------------------------------------------------------------------------------------- the model


def make(c: ConfigDict, directory: Path, console: Console) -> None:
    """Writes the model, unless it is there."""
    config, kind = TransformerConfig(**c.model), jnp.dtype("bfloat16")
    if directory.exists():
        if hf.load_config(directory) != config or hf.stored_dtype(directory) != kind:
            raise ValueError(
                f"{directory} holds another model than config.model in bfloat16; need this one "
                "there, or nothing."
            )
        return
    rng = np.random.default_rng(c.seed)
    leaves, tree = jax.tree.flatten(jax.eval_shape(transformer(config).init, jax.random.key(0)))
    with scripts.progress(console) as bars:
        made = [
            (rng.random(x.shape, np.float32) - 0.5).astype(kind)
            for x in bars.track(leaves, description=f"making {directory}")
        ]
        params = jax.tree.unflatten(tree, made)
        hf.save(directory, config, params, max_shard_bytes=c.max_shard_bytes)


# ----------------------------------------------------------------------------------------- the ways


def _reading(directory: Path) -> list[np.ndarray]:
    found = []
    for path in hf.weight_files(directory):
        memory, done = np.empty(path.stat().st_size, np.uint8), 0
        with path.open("rb", buffering=0) as file:
            while done < len(memory):  # a call reads 2 GiB at most
                done += file.readinto(memory.data[done:])
        found.append(memory)
    return found


WAYS: dict[str, Callable[[Path], Any]] = {
    "reading": _reading,
    "loading": lambda directory: hf.load(directory).params,
    "loading as float32": lambda directory: hf.load(directory, jnp.float32).params,
}


def _processes() -> ProcessPoolExecutor:
    """One at a time, each for one task only, and quick to start where the system can fork."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(["specjax.models.hf"])
    return ProcessPoolExecutor(1, context, max_tasks_per_child=1)


def _measure(way: str, directory: Path) -> tuple[float, int | None]:
    """Seconds, and by how many bytes the process grows at its peak."""
    jax.config.update("jax_platforms", "cpu")
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # starts JAX
    before = _memory("VmRSS")
    start = time.perf_counter()
    held = jax.block_until_ready(WAYS[way](directory))
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM")
    del held
    return seconds, None if before is None or peak is None else peak - before


def _memory(name: str) -> int | None:
    """Bytes that this process holds, or has held at most; None where the system does not tell."""
    if not _STATUS.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return 1024 * int(lines[name].split()[0]) if name in lines else None


# ------------------------------------------------------------------------------------------ results


def _records(
    c: ConfigDict, directory: Path, times: dict[str, list[float]], peaks: dict[str, list[int]]
) -> list[dict[str, Any]]:
    files = hf.weight_files(directory)
    num_bytes = sum(path.stat().st_size for path in files)
    sizes = [math.prod(tensor.shape) for tensor in hf.headers(files).values()]
    records = []
    for way, seconds in times.items():
        width = 4 if way == "loading as float32" else 2
        ratios = [a / b for a, b in zip(seconds, times["reading"], strict=True)]
        took = statistics.median(seconds)
        record = {
            "what": way,
            "seconds": took,
            "seconds_repeats": seconds,
            "gigabytes_per_second": num_bytes / took / 1e9,
            "ratio": statistics.median(ratios),
            "ratio_of_medians": took / statistics.median(times["reading"]),
            "at_most": c.at_most if way == "loading" else None,
            "file_bytes": num_bytes,
            "model_bytes": width * sum(sizes),
            "largest_tensor_bytes": width * max(sizes),
            "peak_bytes": max(peaks[way], default=None),
        }
        records.append(record)
    return records


def _write(c: ConfigDict, directory: Path, records: list[dict[str, Any]], console: Console) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "config.json").write_text(c.to_json_best_effort(indent=1) + "\n")
    num_files = len(hf.weight_files(directory))
    title = (
        f"{records[0]['model_bytes'] // 2:,} parameters, bfloat16, {num_files} "
        f"files; {c.repeats} rounds, {os.cpu_count()} CPUs, jax {jax.__version__}"
    )
    header = ["", "s", "GB/s", "ratio", "of medians", "at most", "peak GB", "model", "at most"]
    rows = []
    for r in records:
        model, peak = r["model_bytes"], r["peak_bytes"]
        row = [r["what"], f"{r['seconds']:.3f}", f"{r['gigabytes_per_second']:.2f}"]
        row += [f"{r['ratio']:.2f}", f"{r['ratio_of_medians']:.2f}"]
        row += [f"{r['at_most']:g}" if r["at_most"] else "", f"{peak / 1e9:.3f}" if peak else "-"]
        row += [f"{x / 1e9:.3f}" for x in (model, model + r["largest_tensor_bytes"])]
        rows.append(row)
    lines = [title, "", *scripts.table(header, rows, console, title)]
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plots.loading(records, output / "results.png")
    console.print(f"Written to {output}: results.json, results.md, results.png", highlight=False)


if __name__ == "__main__":
    scripts.run(main, "configs/bench/loading.py")
