"""What a pass over N tokens costs on CPU beside a pass over one, and what plain decoding does.

    python decode/benchmark.py --config=configs/bench/cpu_kernels.py

Random models, batch 1, a context of `context_length` tokens. A pass ends with the likeliest token
at each place. Each variant keeps weights and cache in its own types, with the CPU's kernels or
without. Passes are timed in compiled loops, plain decoding in the engine and, on the same weights,
in transformers; repeats of all are interleaved, medians shown. Bandwidth is that of the bytes a
pass must read, weights and cache, beside what the machine reads when it does nothing else.
`products` are timed alone beside PyTorch's, which on CPU are oneDNN's.
Writes results.json, results.md and results.png into `config.output`.
"""

import contextlib
import ctypes
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console

from decode import transformers_peer
from specjax import engine, plots, prompts, sampling, scripts
from specjax.drafters.none import none
from specjax.kernels import native
from specjax.kernels.linear import Weights, linear, quantize
from specjax.kernels.vocabulary import argmax
from specjax.models import hf
from specjax.models.transformer import TransformerConfig, num_params, transformer
from specjax.timing import Timed, interleaved, loop, nothing, steps
from specjax.types import Array, Model, Params, PyTree
from specjax.verifiers.match import match

_DECODING, _READ = "decoding", "reading"
_WIDTH = 140  # of a table, in a file


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Measures, writes and prints. Returns the records."""
    _check(c)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    records = []
    for name, shape in c.models.items():
        records += _model(c, name, TransformerConfig(**shape), console)
    records += _products(c, console)
    _write(c, records, console)
    return records


def _check(c: ConfigDict) -> None:
    if c.repeats < 1 or c.seconds <= 0:
        raise ValueError(f"repeats is {c.repeats}, seconds {c.seconds}; need at least 1, over 0.")
    if len(c.num_tokens) != len(c.at_most) or c.num_tokens[0] != 1:
        raise ValueError(
            f"num_tokens is {c.num_tokens} and at_most {c.at_most}; need as many, from 1 on."
        )
    room = c.max_length - c.context_length
    if c.context_length < 1 or max(c.max_new_tokens + 1, *c.num_tokens) > room:
        raise ValueError(
            f"{c.context_length} tokens and {max(c.max_new_tokens + 1, *c.num_tokens)} more need "
            f"more than {c.max_length} slots; raise max_length."
        )
    for name, variant in c.variants.items():
        if variant.weights not in ("float32", "bfloat16", "int8"):
            raise ValueError(
                f"Variant {name!r} has {variant.weights!r} weights; need float32, bfloat16 or int8."
            )
        if variant.cache not in ("float32", "bfloat16"):
            raise ValueError(
                f"Variant {name!r} has a {variant.cache!r} cache; need float32 or bfloat16."
            )


# ------------------------------------------------------------------------------------------- models


def _stored(params: PyTree, weights: str) -> PyTree:
    """Matrices in a type; the rest is too small to matter."""

    def matrix(path: Any, x: Array) -> Weights:
        if x.ndim < 2:
            return x
        if weights != "int8":
            return x.astype(weights)
        is_table = jax.tree_util.keystr(path).endswith("['embed_tokens']")
        return x.astype(jnp.bfloat16) if is_table else quantize(x)

    return jax.tree_util.tree_map_with_path(matrix, params)


def _model(
    c: ConfigDict, name: str, config: TransformerConfig, console: Console
) -> list[dict[str, Any]]:
    """Passes and plain decoding of all variants, and of transformers."""
    key = jax.random.key(c.seed)
    params = jax.jit(transformer(config).init)(key)
    params = _stored(params, "bfloat16")  # so all variants have one law
    stored = {w: _stored(params, w) for w in {v.weights for v in c.variants.values()}}
    rng = np.random.default_rng(c.seed)
    prompt = rng.integers(0, config.vocab_size, (1, c.context_length), dtype=np.int32)
    end = c.context_length + c.max_new_tokens
    batch = prompts.Batch(
        np.pad(prompt, ((0, 0), (0, c.max_new_tokens))),
        np.array([c.context_length], np.int32),
        np.array([end], np.int32),
        np.zeros(1, np.int32),
    )
    loops: dict[str, Timed] = {}
    most: dict[str, int] = {}
    bytes_read: dict[str, int] = {}
    for variant, how in c.variants.items():
        weights, kernels = stored[how.weights], how.kernels
        model = transformer(config, cache_dtype=jnp.dtype(how.cache))
        decoder = engine.decoder(model, none(), match())
        with _kernels(kernels):
            state = engine.prefill(
                decoder,
                Params(weights, ()),
                jax.random.split(key, 1),
                sampling.sampling(1),
                jnp.asarray(prompt),
                jnp.asarray(batch.length),
                jnp.full([1], c.max_length),
                c.max_length,
            )
        cache = replace(state.context.cache, length=state.context.length)
        used = sum(x[:, :, : c.context_length].nbytes for x in (*cache.keys, *cache.values))
        bytes_read[variant] = used + sum(x.nbytes for x in jax.tree.leaves(weights))

        def score(inputs: tuple, tokens: Array, model: Model = model) -> Array:
            weights, cache = inputs
            n = tokens.shape[1]
            positions = cache.length[:, None] + jnp.arange(n)
            mask = jnp.tril(jnp.ones((1, n, n), bool))
            output, _ = model.apply(weights, tokens, positions, mask, cache)
            return tokens + nothing(argmax(output.logits))  # as a verifier would choose

        for n in c.num_tokens:
            tokens = jnp.ones((1, n), jnp.int32)
            loops[f"{variant}: {n}"] = _traced(loop(score, (weights, cache), tokens), kernels)
        label = f"{variant}: {_DECODING}"
        loops[label] = _traced(steps(decoder, Params(weights, ()), state), kernels)
        most[label] = c.max_new_tokens
    with tempfile.TemporaryDirectory() as directory:
        if c.transformers:
            hf.save(directory, config, params)
        for dtype in c.transformers:
            peer = transformers_peer.greedy(directory, "", [batch], dtype)
            peer.measure([batch], 0)  # keeps the faster number of threads

            def decode(n: int, peer: transformers_peer.Peer = peer) -> float:
                timing = peer.run(batch, 0)
                return n * timing.seconds / timing.num_timed

            loops[f"transformers {dtype}: {_DECODING}"] = decode
            most[f"transformers {dtype}: {_DECODING}"] = 2
        loops[_READ] = _reading(max(bytes_read.values()))
        times = interleaved(loops, most, c.repeats, c.seconds, name, console)
    speed = max(bytes_read.values()) / min(times.pop(_READ)) / 1e6  # GB/s
    records = []
    for label, milliseconds in times.items():
        variant, what = label.split(": ")
        first = times.get(f"{variant}: 1", [])
        record = {
            "model": name,
            "parameters": num_params(params),
            "variant": variant,
            "what": what if what == _DECODING else "pass",
            "num_tokens": 1 if what == _DECODING else int(what),
            "milliseconds": statistics.median(milliseconds),
            "milliseconds_repeats": milliseconds,
            "read_gigabytes_per_second": speed,
        }
        if what != _DECODING:
            ratios = [a / b for a, b in zip(milliseconds, first, strict=True)]
            record["ratio"] = statistics.median(ratios)
            record["at_most"] = c.at_most[c.num_tokens.index(int(what))]
            took = statistics.median(milliseconds)
            record["gigabytes_per_second"] = bytes_read[variant] / took / 1e6
        records.append(record)
    return records


def _kernels(used: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if used else native.disabled()


def _traced(timed: Timed, kernels: bool) -> Timed:
    """The same, traced with or without the kernels at its first call."""

    def call(n: int) -> float:
        with _kernels(kernels):
            return timed(n)

    return call


def _reading(size: int) -> Timed:
    """The machine's own speed: the C library's search for a byte that is not there."""
    memory = np.ones(size, np.uint8)
    find = ctypes.CDLL(None).memchr
    find.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    find.restype = ctypes.c_void_p
    parts = np.array_split(memory, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(len(parts))

    def timed(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            list(pool.map(lambda part: find(part.ctypes.data, 0, part.nbytes), parts))
        return time.perf_counter() - start

    return timed


# ----------------------------------------------------------------------------------------- products


def _products(c: ConfigDict, console: Console) -> list[dict[str, Any]]:
    """Products alone, here, in XLA and in PyTorch."""
    loops: dict[str, Timed] = {}
    one_of_each = {(how.weights, how.kernels): variant for variant, how in c.variants.items()}
    for m, n, k in c.products:
        keys = jax.random.split(jax.random.key(c.seed))
        x, w = jax.random.normal(keys[0], (m, k)), jax.random.normal(keys[1], (n, k))
        where = f"{m}, {n}, {k}"

        def multiply(w: Weights, x: Array) -> Array:
            return x + nothing(linear(x, w)).astype(x.dtype)

        for (weights, kernels), variant in one_of_each.items():
            kept = quantize(w) if weights == "int8" else w.astype(weights)
            loops[f"{where}: {variant}"] = _traced(loop(multiply, kept, x), kernels)
        for dtype in c.transformers:
            loops[f"{where}: PyTorch {dtype}"] = _torch_product(m, n, k, dtype)
    if not loops:
        return []
    times = interleaved(loops, {}, c.repeats, c.seconds, "products", console)
    records = []
    for label, milliseconds in times.items():
        where, variant = label.split(": ")
        what = {"what": "product", "shape": [int(size) for size in where.split(", ")]}
        took = {"milliseconds": statistics.median(milliseconds), "variant": variant}
        records.append({**what, **took, "milliseconds_repeats": milliseconds})
    return records


def _torch_product(m: int, n: int, k: int, dtype: str) -> Timed:
    import torch

    x, w = torch.randn(m, k).to(getattr(torch, dtype)), torch.randn(n, k).to(getattr(torch, dtype))

    def timed(count: int) -> float:
        torch.set_num_threads(os.cpu_count() or 1)
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(count):
                torch.nn.functional.linear(x, w)
            return time.perf_counter() - start

    return timed


# ------------------------------------------------------------------------------------------ results


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "config.json").write_text(c.to_json_best_effort(indent=1) + "\n")
    lines = [f"Context {c.context_length}, batch 1, {os.cpu_count()} CPUs, jax {jax.__version__}"]
    for name in c.models:
        own = [r for r in records if r.get("model") == name]
        lines += ["", f"{name}: milliseconds of a pass (times that over one token)", ""]
        lines += _table(c, own, console, lines[-2])
    products = [r for r in records if r["what"] == "product"]
    if products:
        lines += ["", "Milliseconds of a product", ""]
        rows = [[f"{r['shape']}", r["variant"], f"{r['milliseconds']:.3f}"] for r in products]
        lines += scripts.table(["rows, outputs, inputs", "variant", "ms"], rows, console, lines[-2])
    (output / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plots.passes([r for r in records if r["what"] == "pass"], output / "results.png")
    console.print(f"Written to {output}: results.json, results.md, results.png", highlight=False)


def _table(
    c: ConfigDict, records: Sequence[dict[str, Any]], console: Console, title: str
) -> list[str]:
    header = ["variant", *map(str, c.num_tokens), "GB/s at 1", "of reading", "decoding, ms/token"]
    rows = [["at most", *(f"({bound:g})" for bound in c.at_most), "", "", ""]]
    for variant in dict.fromkeys(r["variant"] for r in records):
        own = {(r["what"], r["num_tokens"]): r for r in records if r["variant"] == variant}
        cells = [variant]
        for n in c.num_tokens:
            record = own.get(("pass", n))
            cells.append(f"{record['milliseconds']:.2f} ({record['ratio']:.2f})" if record else "")
        first, decoding = own.get(("pass", 1)), own[_DECODING, 1]
        read = first["gigabytes_per_second"] if first else 0.0
        share = read / decoding["read_gigabytes_per_second"]
        cells += [f"{read:.1f}", f"{100 * share:.0f} %"] if first else ["", ""]
        rows.append([*cells, f"{decoding['milliseconds']:.2f}"])
    return scripts.table(header, rows, console, title)
