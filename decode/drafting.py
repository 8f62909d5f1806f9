"""What guessing costs beside one pass of the target, where no draft model does it.

    python decode/drafting.py                           # configs/bench/draft_free.py

Each drafter decodes in the engine, beside a twin that drafts a tree of the same shape for nothing;
what its step takes longer than the twin's is what guessing costs where it happens: after a pass
that has filled the caches with weights, and with other threads asleep. Weights and text are random,
so that next to nothing is accepted by either. Repeats of all of them are interleaved; figures are
medians over repeats of the differences, and shares of the ratios, within one.

    us            microseconds by which a step is longer than its twin's
    of one        share of a step of plain decoding, to be compared with its bound
    of its own    share of the twin's step

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

from specjax import engine, sampling, scripts, trees
from specjax.build import build
from specjax.models.transformer import TransformerConfig, transformer
from specjax.timing import Timed, interleaved, steps
from specjax.types import (
    Context,
    Decoder,
    DecodeState,
    Draft,
    Drafter,
    Keys,
    Outcome,
    Params,
    PyTree,
)

_PLAIN, _TWIN = "plain decoding", "for nothing"


def main(c: ConfigDict) -> None:
    run(c)


def run(c: ConfigDict) -> list[dict[str, Any]]:
    """Measures, writes and prints. Returns the records."""
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

    def started(drafter: Drafter, weights: PyTree) -> tuple[Decoder, Params, DecodeState]:
        decoder = engine.decoder(target, drafter, verifier)
        params = Params(target_params, weights)
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
        return decoder, params, state

    loops: dict[str, Timed] = {}
    nodes: dict[str, int] = {}
    most: dict[str, int] = {}

    def timed(name: str, decoder: Decoder, params: Params, state: DecodeState) -> None:
        loops[name] = steps(decoder, params, state)
        # All rows go on to the end of a loop, however much is accepted.
        longest = decoder.proposal.depth + 1
        most[name] = (c.max_length - c.prompt_length) // longest

    timed(_PLAIN, *started(build(c.plain.drafter, target=target), ()))
    for name, spec in c.methods.items():
        drafter = build(spec.drafter, target=target)
        weights = build(spec.get("weights", ()), target=target, target_params=target_params)
        decoder, params, state = started(drafter, weights)
        nodes[name] = decoder.proposal.num_nodes
        timed(name, decoder, params, state)
        draft, _ = drafter.propose(params, state.rng_keys, state.drafter, state.context)
        timed(f"{name}: {_TWIN}", *started(for_nothing(drafter, draft), ()))
    times = interleaved(loops, most, c.repeats, c.seconds, "drafting", console)
    records = []
    for name in c.methods:
        plain, own, twin = times[_PLAIN], times[name], times[f"{name}: {_TWIN}"]
        rounds = list(zip(plain, own, twin, strict=True))
        records.append(
            {
                "method": name,
                "num_nodes": nodes[name],
                "microseconds": 1e3 * statistics.median(a - b for _, a, b in rounds),
                "share": statistics.median((a - b) / p for p, a, b in rounds),
                "share_of_own": statistics.median((a - b) / b for _, a, b in rounds),
                "bound": c.bound,
                "step_microseconds": 1e3 * statistics.median(plain),
                "batch_size": c.batch_size,
                "max_length": c.max_length,
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
        )
    _write(c, records, console)
    return records


def for_nothing(drafter: Drafter, draft: Draft) -> Drafter:
    """Drafts a tree of the shape of `draft`, whatever the text, and learns nothing.

    Every node has the root's token, which is as good as any where the target is random.
    """
    parents = jax.device_get(draft.parents)

    def init(batch_size: int, max_length: int) -> tuple:
        del batch_size, max_length
        return ()

    def propose(params: Params, rng_keys: Keys, state: Any, context: Context) -> tuple[Draft, Any]:
        del params, rng_keys
        tokens = jnp.broadcast_to(trees.root(context), parents.shape)
        num_drafted = jnp.full(len(parents), parents.shape[1] - 1)
        return Draft(tokens, jnp.asarray(parents), None, num_drafted, draft.depth), state

    def observe(params: Params, state: Any, context: Context, outcome: Outcome) -> Any:
        del params, context, outcome
        return state

    return Drafter(init, propose, observe, drafter.proposal._replace(law="point"))


def _write(c: ConfigDict, records: list[dict[str, Any]], console: Console) -> None:
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    first = records[0]
    title = (
        f"A step of plain decoding takes {first['step_microseconds'] / 1e3:.2f} ms; batch "
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
