"""A finished run as one page: report.html with its pictures inside, and the same PNGs beside it.

Read from the run's folder, each only if it is there:
    metrics.jsonl                         curves (training/metrics.py says which names)
    summary.json, config.yaml             the result and the settings
    evaluation_{before,after}.npz         EvaluationTable.save
    filmstrips/{before,after,real}.npz    Filmstrips.save, one row per prompt, its text as label
    filmstrips/branches.npz               the same, one row per sequence of a group: the anchor and
                                          `branch 0: 3, 5, 9`, with window and caption
"""

from __future__ import annotations

import base64
import html
import json
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from megatron_kvpo.log import get_logger
from megatron_kvpo.training.filmstrips import (
    BLUE,
    COLOURS,
    DPI,
    GREEN,
    INK,
    ORANGE,
    RED,
    VIOLET,
    Filmstrips,
    branches_figure,
    comparison_figure,
)
from megatron_kvpo.training.metrics import read_jsonl
from megatron_kvpo.training.summary import EvaluationTable, paired_gain

logger = get_logger(__name__)

Array = npt.NDArray[np.float64]
Curve = tuple[Array, Array]

_CYCLE = (BLUE, ORANGE, GREEN, RED, VIOLET)
_VARIANTS = ("min", "max", "mean", "std")


def write_report(folder: Path, title: str | None = None) -> Path:
    """Write report.html and its PNGs into the run's folder; what has no input is left out."""
    pictures: list[tuple[str, str, Figure | None]] = [
        ("rewards", "Reward per update", _reward_curves(folder)),
        ("components", "Before and after, per reward", _component_bars(folder)),
        ("filmstrips", "The same prompts and noises, before and after", _before_after(folder)),
        ("branches", "What routing explored", _branches(folder)),
        ("policy", "The policy while it trained", _policy_curves(folder)),
    ]
    sections = []
    for name, heading, figure in pictures:
        if figure is None:
            continue
        path = folder / f"report_{name}.png"
        save_figure(figure, path)
        data = base64.b64encode(path.read_bytes()).decode()
        sections.append(
            f"<h2>{html.escape(heading)}</h2>"
            f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
        )
    page = folder / "report.html"
    page.write_text(_page(folder, title or folder.name, sections), encoding="utf-8")
    logger.info("report at %s", page)
    return page


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, facecolor="white")


def read_curves(path: Path) -> dict[str, Curve]:
    """Name -> (update, value) from a metrics.jsonl, in order; empty if it is not there."""
    if not path.is_file():
        return {}
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in read_jsonl(path):
        for name, value in line.items():
            if "/" in name and isinstance(value, int | float):
                points[name].append((line["update"], value))
    return {
        name: (np.array([u for u, _ in pairs], dtype=np.float64), np.array([v for _, v in pairs]))
        for name, pairs in points.items()
    }


def smooth(value: Array, width: int, error: Array | None = None) -> tuple[Array, Array]:
    """Running mean over a centred window of `width` and its standard error. Same length.

    From the spread inside the window, or, given the error of each value, sqrt(sum error^2) / n.
    """
    mean, band = np.empty(len(value)), np.zeros(len(value))
    for i in range(len(value)):
        near = slice(max(0, i - width // 2), i + width // 2 + 1)
        size = len(value[near])
        mean[i] = value[near].mean()
        if error is not None:
            band[i] = np.sqrt(np.square(error[near]).sum()) / size
        elif size > 1:
            band[i] = value[near].std(ddof=1) / np.sqrt(size)
    return mean, band


def draw_curve(
    axes: Any, curve: Curve, colour: str, label: str, error: Array | None = None
) -> None:
    """A faint raw line, its running mean and the mean's 95 % band."""
    update, value = curve
    usable = error if error is not None and len(error) == len(value) else None
    mean, band = smooth(value, max(3, len(value) // 8), usable)
    axes.plot(update, value, color=colour, alpha=0.3, linewidth=0.8, marker=".", markersize=3)
    axes.fill_between(
        update, mean - 1.96 * band, mean + 1.96 * band, color=colour, alpha=0.18, lw=0
    )
    axes.plot(update, mean, color=colour, linewidth=2, label=label)


def tidy(axes: Any, title: str, xlabel: str = "update", ylabel: str = "") -> None:
    """House style of one panel."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _panels(count: int, columns: int = 3) -> tuple[Figure, list[Any]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def _reward_curves(folder: Path) -> Figure | None:
    curves = read_curves(folder / "metrics.jsonl")
    names = [n for n in curves if n.startswith("reward/") and not n.endswith("_se")]
    if not names:
        return None
    names.sort(key=lambda name: (name != "reward/composite", name))
    figure, grid = _panels(len(names))
    for axes, name in zip(grid, names, strict=True):
        colour = BLUE if name == "reward/composite" else INK
        error = curves.get(f"{name}_se")
        draw_curve(axes, curves[name], colour, name, None if error is None else error[1])
        tidy(axes, name.removeprefix("reward/").replace("_", " "))
    return figure


def _policy_curves(folder: Path) -> Figure | None:
    curves = read_curves(folder / "metrics.jsonl")
    panels: dict[str, list[tuple[str, Curve]]] = defaultdict(list)
    for name, curve in curves.items():
        if not name.startswith(("policy/", "loss/")):
            continue
        stem, _, variant = name.rpartition("_")
        joined = stem if variant in _VARIANTS else name
        panels[joined].append((variant if variant in _VARIANTS else "", curve))
    if not panels:
        return None
    figure, grid = _panels(len(panels))
    for axes, (name, members) in zip(grid, sorted(panels.items()), strict=True):
        for (variant, (update, value)), colour in zip(members, _CYCLE, strict=False):
            axes.plot(update, value, color=colour, linewidth=1.4, label=variant or None)
        if len(members) > 1:
            axes.legend(fontsize=7, frameon=False)
        tidy(axes, name.replace("_", " "))
        if len(members[0][1][1]) > 1 and _spans_decades([v for _, (_, v) in members]):
            axes.set_yscale("log")
    return figure


def _spans_decades(values: Sequence[Array]) -> bool:
    everything = np.concatenate(list(values))
    return bool(everything.min() > 0 and everything.max() / everything.min() > 100)


def _component_bars(folder: Path) -> Figure | None:
    paths = [folder / f"evaluation_{when}.npz" for when in ("before", "after")]
    if not all(path.is_file() for path in paths):
        return None
    before, after = (EvaluationTable.load(path) for path in paths)
    held_out = _held_out(folder)
    names: list[str | None] = [None, *before.components]
    titles = [
        "composite" if n is None else f"{n} (held out)" if n in held_out else n for n in names
    ]
    figure = Figure(figsize=(max(6.0, 1.5 * len(names) + 3), 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    place = np.arange(len(names))
    for offset, table, label in ((-0.2, before, "before"), (0.2, after, "after")):
        mean_R = [table.of(name).astype(np.float64).mean(axis=1) for name in names]
        height = [mean.mean() for mean in mean_R]
        error = [1.96 * mean.std(ddof=1) / np.sqrt(len(mean)) for mean in mean_R]
        left.bar(place + offset, height, 0.38, yerr=error, color=COLOURS[label], label=label,
                 capsize=2, error_kw={"lw": 1, "ecolor": INK})  # fmt: skip
    left.legend(fontsize=8, frameon=False, loc="lower right", ncols=2, bbox_to_anchor=(1, 1))
    tidy(left, "score, 95 % over prompts", "")
    gains = [paired_gain(before, after, name) for name in names]
    colours = [GREEN if n in held_out else BLUE for n in names]
    errors = [1.96 * g.standard_error for g in gains]
    right.bar(place, [g.gain_sd for g in gains], 0.55, yerr=errors, color=colours, capsize=3,
              error_kw={"lw": 1, "ecolor": INK})  # fmt: skip
    right.axhline(0, color=INK, linewidth=0.8)
    tidy(right, "paired gain in SD of the base, 95 %", "")
    for axes in (left, right):
        axes.set_xticks(place, [textwrap.fill(t.replace("_", " "), 12) for t in titles],
                        rotation=30, ha="right", rotation_mode="anchor")  # fmt: skip
    return figure


def _held_out(folder: Path) -> set[str]:
    path = folder / "summary.json"
    if not path.is_file():
        return set()
    components = json.loads(path.read_text()).get("components", {})
    return {name for name, entry in components.items() if entry.get("held_out")}


def _before_after(folder: Path) -> Figure | None:
    loaded = {
        name: Filmstrips.load(folder / "filmstrips" / f"{name}.npz")
        for name in ("real", "before", "after")
    }
    rows = {name: strips for name, strips in loaded.items() if strips is not None}
    if "before" not in rows and "after" not in rows:
        return None
    return comparison_figure([rows])


def _branches(folder: Path) -> Figure | None:
    strips = Filmstrips.load(folder / "filmstrips" / "branches.npz")
    return None if strips is None else branches_figure(strips)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #30363d; max-width: 1300px;
       margin: 2em auto; padding: 0 1em }
img { max-width: 100% } h1 { margin-bottom: 0 } h2 { margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .25em 1em; text-align: right;
       border-bottom: 1px solid #e3e6ea } td:first-child, th:first-child { text-align: left }
pre { background: #f5f6f8; padding: 1em; overflow: auto }
"""


def _page(folder: Path, title: str, sections: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{name}</h1>"
        f"{_result_table(folder)}{''.join(sections)}{_settings(folder)}</body></html>\n"
    )


def _result_table(folder: Path) -> str:
    path = folder / "summary.json"
    if not path.is_file():
        return "<p>The run has no summary yet.</p>"
    result = json.loads(path.read_text())
    total = {"before": result["reward_before"], "after": result["reward_after"], **result}
    rows = [("composite", total), *result["components"].items()]
    lines = []
    for name, entry in rows:
        label = f"{name} (held out)" if entry.get("held_out") else name
        lines.append(
            f"<tr><td>{html.escape(label)}</td><td>{entry['before']:.4f}</td>"
            f"<td>{entry['after']:.4f}</td>"
            f"<td>{entry['gain_sd']:+.3f} ± {entry['standard_error']:.3f}</td></tr>"
        )
    return (
        f"<p>{result['updates']} updates of {result['seconds_per_update']:.2f} s on "
        f"{result['ranks']} ranks.</p><table><tr><th>reward</th><th>before</th><th>after</th>"
        f"<th>gain, SD ± standard error</th></tr>{''.join(lines)}</table>"
    )


def _settings(folder: Path) -> str:
    path = folder / "config.yaml"
    if not path.is_file():
        return ""
    text = html.escape(path.read_text())
    return f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
