"""Trains drafters at equal budgets, several seeds each, and compares what decoding accepts.

    python train/compare.py
    python train/compare.py --config=configs/compare.py --config.seeds="(1,)"

Every run of `config.runs` is a config of `configs/train` with changes. It trains into a directory
of its own below `config.output`; one that is there is taken as it is, so that an interrupted
comparison goes on. All drafters then decode the same held-out prompts, and the pairs in
`config.comparisons` are compared prompt by prompt. Writes results.json, results.md and results.png.
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from specjax import checkpoints, evaluation, metrics, plots, prompts, scripts
from specjax.build import build
from specjax.types import Model, Params


def main(c: ConfigDict) -> None:
    from train.train import train  # `scripts.run` has made it known by now

    output = Path(c.output)
    runs = {(name, seed): _config(c, name, seed) for name in c.runs for seed in c.seeds}
    for i, ((name, seed), own) in enumerate(runs.items(), 1):
        if not Path(own.export, "recipe.json").exists():
            print(f"Run {i} of {len(runs)}: {name}, seed {seed}", flush=True)
            train(own)
            jax.clear_caches()
    records = []
    for name in c.runs:
        found = [_measured(c, runs[name, seed]) for seed in c.seeds]
        for t in c.temperatures:
            own = [summaries[f"{t:g}"] for summaries in found]
            record = {"run": name, "temperature": t, **metrics.pooled(own)}
            records.append({**record, "seeds": [summary["mat"] for summary in own]})
    for ours, theirs in c.comparisons:
        for t in c.temperatures:
            one, other = (_of(records, name, t) for name in (ours, theirs))
            one.setdefault("mat_over", {})[theirs] = metrics.difference(one, other)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    page = _page(c, records, runs)
    (output / "results.md").write_text(page)
    plots.acceptance(records, output / "results.png")
    print(page)
    print(f"Written to {output}: results.json, results.md, results.png")


def _config(c: ConfigDict, name: str, seed: int) -> ConfigDict:
    """A run's own config.

    Raises:
        ValueError: it names no config, or changes what that does not have.
    """
    spec = c.runs[name]
    try:
        own = importlib.import_module(f"configs.train.{spec.config}").get_config()
    except ImportError as error:
        raise ValueError(f"Run {name!r} has config {spec.config!r}: {error}.") from error
    where = str(Path(c.output) / name.replace(" ", "_") / str(seed))
    changes = _changed(c.common.to_dict(), spec.get("changes", ConfigDict()).to_dict())
    changes |= {"target": c.target, "seed": seed, "export": f"{where}/export", "workdir": where}
    for option in changes.keys() - own.keys():
        raise ValueError(f"Run {name!r} changes {option!r}, which {spec.config} does not have.")
    return ConfigDict(_changed(own.to_dict(), changes))


def _changed(own: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Groups of options are changed one by one; what a "call" builds is changed as a whole."""
    changed = dict(own)
    for name, value in changes.items():
        is_group = isinstance(value, dict) and isinstance(own.get(name), dict)
        if is_group and "call" not in value:
            value = _changed(own[name], value)
        changed[name] = value
    return changed


def _measured(c: ConfigDict, own: ConfigDict) -> dict[str, Any]:
    """What decoding accepts of a trained run's drafts, by temperature; kept on disk."""
    asked = {name: c[name] for name in ("num_prompts", "prompt_length", "max_new_tokens")}
    asked = json.loads(json.dumps({**asked, "build": c.build.to_dict()}))
    path = Path(own.workdir, "acceptance.json")
    if path.exists() and (kept := json.loads(path.read_text()))["asked"] == asked:
        found: dict[str, Any] = kept["found"]
        return found
    models = checkpoints.load(c.target, own.export)
    draft = models.drafts["draft"]
    drafter = "model" if isinstance(draft.model, Model) else own.objective.split(".")[-2]
    given = {"target": models.target, "draft": draft.model, "build": build(c.build)}
    texts = prompts.held_out(models.tokenizer, c.num_prompts, c.prompt_length, seed=0)
    measure = evaluation.acceptance(
        models.target,
        build(c.drafters[drafter], **given),
        texts,
        c.max_new_tokens,
        models.context,
        models.eos_ids,
        c.temperatures,
    )
    found = {
        f"{t:g}": summary
        for t, summary in measure(Params(models.target_params, draft.params)).items()
    }
    path.write_text(json.dumps({"asked": asked, "found": found}) + "\n")
    return found


def _of(records: Sequence[dict[str, Any]], name: str, temperature: float) -> dict[str, Any]:
    for record in records:
        if (record["run"], record["temperature"]) == (name, temperature):
            return record
    raise ValueError(
        f"A comparison names {name!r}; there are {', '.join(r['run'] for r in records)}."
    )


def _page(c: ConfigDict, records: list[dict[str, Any]], runs: dict) -> str:
    tokens = {o.num_steps * o.batch_size * o.sequence_length for o in runs.values()}
    lines = [
        f"{' to '.join(f'{n / 1e6:.2f}M' for n in sorted({min(tokens), max(tokens)}))} tokens of "
        f"training, seeds {', '.join(map(str, c.seeds))}; {c.num_prompts} prompts, "
        f"{c.max_new_tokens} new tokens each; tokens per target pass with 95 % intervals over "
        "prompts, and of each seed",
        "",
        "| T | run | tokens per pass | seeds |",
        "| --- | --- | ---: | --- |",
    ]
    for t in c.temperatures:
        for r in (r for r in records if r["temperature"] == t):
            half = (r["mat_interval"][1] - r["mat_interval"][0]) / 2
            seeds = ", ".join(f"{x:.3f}" for x in r["seeds"])
            lines.append(f"| {t:g} | {r['run']} | {r['mat']:.3f} ± {half:.3f} | {seeds} |")
    lines += ["", "| T | run | over | more per pass |", "| --- | --- | --- | ---: |"]
    for t in c.temperatures:
        for r in (r for r in records if r["temperature"] == t):
            for other, over in r.get("mat_over", {}).items():
                half = (over["interval"][1] - over["interval"][0]) / 2
                more = f"{over['difference']:+.3f} ± {half:.3f}"
                lines.append(f"| {t:g} | {r['run']} | {other} | {more} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    scripts.run(main, "configs/compare.py")
