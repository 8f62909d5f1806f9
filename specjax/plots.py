"""Pictures of what the scripts of `decode/` find."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

_COLOURS = ("#35618f", "#c8702a", "#4c8c57", "#8a4f7d")


def speedups(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Speed-up and tokens per target pass by method; lossy ones hatched.

    Grouped by temperature and, if there are several, by batch size. Tokens per pass with their
    intervals, where a record has one.

    Args:
        records: in the order to draw; `decode/benchmark.py` says what one holds.
        path: the image to write.
    """
    temperatures = list(dict.fromkeys(r["temperature"] for r in records))
    groups = [(r["batch_size"], r["temperature"]) for r in records]
    has_sizes = len({batch_size for batch_size, _ in groups}) > 1
    place, at = [], 0.0
    for i, group in enumerate(groups):
        at += 0.7 if i and group != groups[i - 1] else 0.0
        place.append(at)
        at += 1.0
    colours = [_COLOURS[temperatures.index(r["temperature"]) % len(_COLOURS)] for r in records]
    height = 1.2 + 0.34 * at
    figure, panels = plt.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")

    def draw(axes: Axes, name: str, title: str) -> None:
        values = [r[name] or 0.0 for r in records]
        intervals = [r.get(f"{name}_interval") for r in records]
        ends = np.array([found or (v, v) for found, v in zip(intervals, values, strict=True)]).T
        bars = axes.barh(
            place,
            values,
            0.78,
            color=colours,
            edgecolor="white",
            xerr=np.abs(ends - values),
            error_kw={"ecolor": "0.25", "elinewidth": 1.2},
        )
        for bar, record in zip(bars, records, strict=True):
            if not record["lossless"]:
                bar.set_hatch("///")
        labels = ["-" if r[name] is None else f"{r[name]:.2f}" for r in records]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.bar_label(bars, labels, padding=4, fontsize=9, bbox=box)
        axes.axvline(1.0, color="0.35", linewidth=0.9, linestyle="--", zorder=1.5)
        axes.set_xlim(0, 1.15 * max(ends.max(), 1.0))
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)

    draw(panels[0], "speedup", "Speed-up over plain decoding")
    draw(panels[1], "mat", "Tokens per target pass")
    names = [r["method"] + (f", B={r['batch_size']}" if has_sizes else "") for r in records]
    panels[0].set_yticks(place, names)
    panels[0].invert_yaxis()
    handles = [
        Patch(color=_COLOURS[i % len(_COLOURS)], label=f"temperature {t:g}")
        for i, t in enumerate(temperatures)
    ]
    if not all(r["lossless"] for r in records):
        handles.append(Patch(facecolor="0.7", edgecolor="white", hatch="///", label="lossy"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


_ROUNDING = 1e-18  # a total variation of 0 is drawn as this


def distances(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Total variations of rules by proposals, a panel for each dtype: refusals grey, failures red.

    Args:
        records: in the order to draw; `decode/certify.py` says what one holds.
        path: the image to write.
    """
    dtypes, rules, proposals = (
        list(dict.fromkeys(r[name] for r in records)) for name in ("dtype", "rule", "proposal")
    )
    size = (2.6 + 0.75 * len(rules) * len(dtypes), 1.7 + 0.34 * len(proposals))
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    shades = plt.get_cmap("GnBu")
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for record in records:
            if record["dtype"] != dtype:
                continue
            x, y = rules.index(record["rule"]), proposals.index(record["proposal"])
            distance = record["figures"].get("total_variation")
            power = None if distance is None else math.log10(max(distance, _ROUNDING))
            colour: Any
            if record["outcome"] == "refused":
                colour, ink, text = "0.9", "0.45", "refused"
            elif record["outcome"] == "failed" or power is None:
                colour, ink = "#b3322c", "white"
                text = "FAIL" if power is None else f"FAIL {power:.0f}"
            else:
                depth = 0.1 + 0.6 * (power + 18) / 12  # from 1e-18 to 1e-6
                colour, ink, text = shades(min(max(depth, 0.1), 0.7)), "0.1", f"{power:.1f}"
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
            axes.text(x, y, text, color=ink, fontsize=8, ha="center", va="center")
        axes.set_xlim(-0.5, len(rules) - 0.5)
        axes.set_ylim(len(proposals) - 0.5, -0.5)
        axes.set_xticks(range(len(rules)), rules)
        axes.set_yticks(range(len(proposals)), proposals)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        axes.set_title(dtype, fontsize=11)
    figure.suptitle("Total variation from the target's law, log10", fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def costs(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A bar for each rule's share of a target pass, a stroke at its bound.

    Args:
        records: in the order to draw; `decode/verification.py` says what one holds.
        path: the image to write.
    """
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.3 * len(records)), layout="constrained")
    place = range(len(records))
    shares, bounds = ([100 * r[name] for r in records] for name in ("share", "bound"))
    bars = axes.barh(place, shares, 0.7, color=_COLOURS[0])
    axes.bar_label(bars, [f"{r['microseconds']:.0f} us" for r in records], padding=4, fontsize=8)
    axes.scatter(bounds, place, 140, _COLOURS[1], marker="|", linewidths=2, label="bound")
    axes.set_yticks(place, [r["case"] for r in records])
    axes.invert_yaxis()
    axes.set_xlabel("% of one target pass")
    axes.set_xlim(0, 1.15 * max(bounds + shares))
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def passes(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Milliseconds of a pass by its number of tokens, a panel for each model, a line a variant.

    Args:
        records: `decode/passes.py` says what one holds.
        path: the image to write.
    """
    models = list(dict.fromkeys(r["model"] for r in records))
    variants = list(dict.fromkeys(r["variant"] for r in records))
    figure, panels = plt.subplots(
        1, len(models), figsize=(1 + 4 * len(models), 3.6), squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models, strict=True):
        for i, variant in enumerate(variants):
            own = [r for r in records if (r["model"], r["variant"]) == (model, variant)]
            tokens, times = ([r[name] for r in own] for name in ("num_tokens", "milliseconds"))
            colour = _COLOURS[i % len(_COLOURS)]
            label = variant if model == models[0] else None
            axes.plot(tokens, times, marker="o", markersize=4, color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, tokens)
        axes.set_ylim(0)
        axes.set_title(model, fontsize=11)
        axes.set_xlabel("tokens of a pass")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("milliseconds")
    figure.legend(loc="outside lower center", ncols=len(variants), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def differences(records: Sequence[dict[str, Any]], tolerance: float, path: str | Path) -> None:
    """How far logits are from a reference's: in float32, and in bfloat16 beside its own rounding.

    Args:
        records: in the order to draw; `decode/parity.py` says what one holds.
        tolerance: of float32.
        path: the image to write.
    """
    size = (9, 1.3 + 0.24 * len(records))
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    place = range(len(records))

    def draw(axes: Axes, names: dict[str, str], label: str) -> None:
        for i, (name, what) in enumerate(names.items()):
            values = [r[name] for r in records]
            colour, marker = _COLOURS[i % len(_COLOURS)], "osd"[i]
            axes.scatter(values, place, 22, colour, marker=marker, label=what)
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_axisbelow(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=9)

    ways = {"uncached": "uncached", "cached": "cached", "tree": "tree"}
    draw(panels[0], ways, "largest difference of float32 logits")
    panels[0].axvline(tolerance, color="0.35", linewidth=0.9, linestyle="--")
    half = {"bfloat16": "bfloat16 of both"}
    half |= {"bfloat16_here": "ours, float32", "bfloat16_there": "theirs, float32"}
    draw(panels[1], half, "of bfloat16, in standard deviations of the logits")
    panels[0].set_yticks(place, [r["variant"] for r in records])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def acceptance(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Tokens per target pass of each run, a panel for each temperature: interval and seeds.

    Args:
        records: in the order to draw; `train/compare.py` says what one holds.
        path: the image to write.
    """
    temperatures = list(dict.fromkeys(r["temperature"] for r in records))
    runs = list(dict.fromkeys(r["run"] for r in records))
    size = (2 + 4 * len(temperatures), 1 + 0.32 * len(runs))
    figure, panels = plt.subplots(
        1, len(temperatures), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for i, (axes, temperature) in enumerate(zip(panels[0], temperatures, strict=True)):
        own = [r for r in records if r["temperature"] == temperature]
        place = [runs.index(r["run"]) for r in own]
        low, high = np.array([r["mat_interval"] for r in own]).T
        axes.hlines(place, low, high, _COLOURS[i % len(_COLOURS)], linewidth=5, alpha=0.35)
        for y, record in zip(place, own, strict=True):
            axes.plot(record["seeds"], [y] * len(record["seeds"]), "|", color="0.25", markersize=9)
        axes.plot([r["mat"] for r in own], place, "o", color=_COLOURS[i % len(_COLOURS)])
        axes.set_title(f"temperature {temperature:g}", fontsize=11)
        axes.set_xlabel("tokens per target pass")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", linewidth=0.4)
    panels[0][0].set_yticks(range(len(runs)), runs)
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def loading(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Seconds of every round, and peaks of memory over the model; strokes at what each may be.

    Args:
        records: in the order to draw, reading first; `decode/loading.py` says what one holds.
        path: the image to write.
    """
    size = (9, 1.2 + 0.4 * len(records))
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    place, reading = range(len(records)), records[0]["seconds"]
    peaks = [(r["peak_bytes"] or 0) / 1e9 for r in records]
    limits = [(r["model_bytes"] + r["largest_tensor_bytes"]) / 1e9 for r in records]
    bars = panels[0].barh(place, [r["seconds"] for r in records], 0.7, color=_COLOURS[0])
    labels = [f"{r['ratio']:.2f} x" for r in records]
    panels[0].bar_label(bars, labels, label_type="center", color="white", fontsize=9)
    for y, record in enumerate(records):
        rounds = record["seconds_repeats"]
        panels[0].plot(rounds, [y] * len(rounds), "|", color="0.25", markersize=7)
        if record["at_most"] is not None:
            panels[0].scatter(record["at_most"] * reading, y, 260, _COLOURS[1], marker="|")
    panels[0].set_xlabel("seconds")
    panels[1].barh(place, peaks, 0.7, color=_COLOURS[0])
    panels[1].scatter(limits, place, 260, _COLOURS[1], marker="|", label="at most")
    panels[1].set_xlabel("peak of memory, GB")
    for axes in panels:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(place, [r["what"] for r in records])
    panels[0].invert_yaxis()
    figure.legend(loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
