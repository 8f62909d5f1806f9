"""What guessing costs beside one pass of the target, where no draft model does it.

    python decode/drafting.py                           # configs/bench/draft_free.py

The target's pass is real, with random weights and a random text. A drafter's `propose` and
`observe` run in a compiled loop on what a step shows them, see `decode/profile.py`. Repeats of all
of them are interleaved; shares are medians over repeats of the ratios within one.

    us            microseconds of `propose` and `observe` in a step, the median over repeats
    of one        share of a pass over one token, to be compared with its bound
    of its own    share of the pass over the nodes drafted

Writes results.json and results.md into `config.output`.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.table import Table

from specjax import engine, sampling, scripts
from specjax.build import build
from specjax.models.transformer import TransformerConfig, transformer
from specjax.timing import Timed, interleaved, loop
from specjax.types import Params

_PASS, _OWN = "a pass over one token", "its pass"


def main(c: ConfigDict) -> None:
    run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Measures, writes and prints. Returns the records."""
    from decode.profile import parts_of  # `scripts.run` has made it known by now

    if c.repeats < 1 or c.seconds <= 0 or not c.methods:
        raise ValueError(
            f"repeats is {c.repeats}, seconds {c.seconds} and there are {len(c.methods)} methods; "
            "need at least 1, over 0 and at least 1."
        )
    if not 1 <= c.prompt_length <= c.max_length // 2:
        raise ValueError(
            f"prompt_length is {c.prompt_length}; need 1 to {c.max_length // 2}, half the buffer."
        )
    console = Console()
    target = transformer(TransformerConfig(**c.target))
    target_params = jax.jit(target.init)(jax.random.key(c.seed))
    verifier = build(c.verifier)
    shape = (c.batch_size, c.prompt_length)
    prompt = jax.random.randint(jax.random.key(c.seed + 1), shape, 0, target.vocab_size)
    loops: dict[str, Timed] = {}
    nodes: dict[str, int] = {}
    for name, spec in {_PASS: c.plain, **c.methods}.items():
        drafter = build(spec.drafter, target=target)
        weights = build(spec.get("weights", ()), target=target, target_params=target_params)
        params = Params(target_params, weights)
        decoder = engine.decoder(target, drafter, verifier)
        state = engine.prefill(
            decoder,
            params,
            jax.random.split(jax.random.key(c.seed), c.batch_size),
            sampling.sampling(c.batch_size, c.temperature),
            prompt,
            jnp.full([c.batch_size], c.prompt_length),
            jnp.full([c.batch_size], c.max_length),
            c.max_length,
        )
        parts = parts_of(target, drafter, verifier, None, params, state)
        nodes[name] = decoder.proposal.num_nodes
        if name == _PASS:
            loops[name] = loop(*parts["target"])
        else:
            loops[name] = loop(*parts["drafter"])
            loops[f"{name}: {_OWN}"] = loop(*parts["target"])
    times = interleaved(loops, {}, c.repeats, c.seconds, "drafting", console)
    records = [
        {
            "method": name,
            "num_nodes": nodes[name],
            "microseconds": 1e3 * statistics.median(times[name]),
            "share": _share(times[name], times[_PASS]),
            "share_of_own": _share(times[name], times[f"{name}: {_OWN}"]),
            "bound": c.bound,
            "pass_microseconds": 1e3 * statistics.median(times[_PASS]),
            "batch_size": c.batch_size,
            "max_length": c.max_length,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        for name in c.methods
    ]
    _write(c, records, console)
    return records


def _share(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    first = records[0]
    title = (
        f"A pass over one token takes {first['pass_microseconds'] / 1e3:.2f} ms; batch "
        f"{first['batch_size']}, {first['max_length']} slots, {first['device']}, "
        f"jax {first['jax']}"
    )
    names = ("nodes", "us", "of one %", "bound %", "of its own %")
    table = Table("method", *names, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    lines = [
        title,
        "",
        "| method | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for r in records:
        cells = (
            r["method"],
            f"{r['num_nodes']}",
            f"{r['microseconds']:.0f}",
            f"{100 * r['share']:.1f}",
            f"{100 * r['bound']:g}",
            f"{100 * r['share_of_own']:.1f}",
        )
        table.add_row(*cells, style="" if r["share"] <= r["bound"] else "red")
        lines.append("| " + " | ".join(cells) + " |")
    (output / "results.md").write_text("\n".join(lines) + "\n")
    console.print(title, highlight=False)
    console.print(table)


if __name__ == "__main__":
    scripts.run(main, "configs/bench/draft_free.py")
