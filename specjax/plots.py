"""Bars for benchmark records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

_COLOURS = ("#35618f", "#c8702a", "#4c8c57", "#8a4f7d")


def speedups(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Speed-up and tokens per target pass by method, grouped by temperature; lossy ones hatched.

    Args:
        records: in the order to draw; `decode/benchmark.py` says what one holds.
        path: the image to write.
    """
    temperatures = list(dict.fromkeys(r["temperature"] for r in records))
    place, at = [], 0.0
    for i, record in enumerate(records):
        at += 0.7 if i and record["temperature"] != records[i - 1]["temperature"] else 0.0
        place.append(at)
        at += 1.0
    colours = [_COLOURS[temperatures.index(r["temperature"]) % len(_COLOURS)] for r in records]
    height = 1.2 + 0.34 * at
    figure, panels = plt.subplots(1, 2, figsize=(10, height), sharey=True, layout="constrained")

    def draw(axes: Axes, name: str, title: str) -> None:
        values = [r[name] or 0.0 for r in records]
        bars = axes.barh(place, values, 0.78, color=colours, edgecolor="white")
        for bar, record in zip(bars, records, strict=True):
            if not record["lossless"]:
                bar.set_hatch("///")
        labels = ["-" if r[name] is None else f"{r[name]:.2f}" for r in records]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.bar_label(bars, labels, padding=4, fontsize=9, bbox=box)
        axes.axvline(1.0, color="0.35", linewidth=0.9, linestyle="--", zorder=1.5)
        axes.set_xlim(0, 1.15 * max([*values, 1.0]))
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)

    draw(panels[0], "speedup", "Speed-up over plain decoding")
    draw(panels[1], "mat", "Tokens per target pass")
    panels[0].set_yticks(place, [r["method"] for r in records])
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
