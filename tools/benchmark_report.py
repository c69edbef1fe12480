"""The table and the plot of a benchmark, made from its JSON and nothing else.

python -m tools.benchmark_report FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from tools import provenance

_COLOURS = ("#2f6fdb", "#e07b39", "#3c9d6b", "#b04ea5", "#8a8d93", "#d4b106", "#4bb3c1", "#c0392b",
            "#7f6df2", "#8d6e3f", "#e58fb0", "#a3b86c")  # fmt: skip
_SCORING = "#222c3a"


def write(found: dict[str, Any], path: Path) -> None:
    """Write the record, and its table (.md) and plot (.png) beside it."""
    provenance.write_json(found, path)
    draw(path)


def draw(path: Path) -> None:
    """Make table and plot of a JSON anew."""
    found = json.loads(path.read_text())
    scaled = "runs" in found
    path.with_suffix(".md").write_text(scaling_table(found) if scaled else stage_table(found))
    figure = scaling_figure(found) if scaled else stage_figure(found)
    figure.savefig(path.with_suffix(".png"))


def stage_table(found: dict[str, Any]) -> str:
    """One line a stage, and the whole update."""
    top = head(found)
    if "peak_memory_gib" in found:
        top += f"Peak memory {found['peak_memory_gib']:.1f} GiB. "
    if found.get("warmup") == 0:
        top += "The first update of its process: kernels were compiled in it. "
    top += f"A large matrix product reaches {found['matmul_ceiling_tflops']:.3g} TFLOP/s here.\n\n"
    lines = [
        "| stage | seconds: median (min to max) | row passes | TFLOP | TFLOP/s | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in (*found["stages"].items(), ("**update**", found["update"])):
        rate = f"{part['tflops']:.3g} | {part['share']:.0%}" if part["tflop"] else " | "
        work = f"{part['tflop']:.4g}" if part["tflop"] else ""
        span = f"{part['median_s']:.3g} ({part['min_s']:.3g} to {part['max_s']:.3g})"
        lines.append(f"| {name} | {span} | {part['passes'] or ''} | {work} | {rate} |")
    if "ranks" in found:
        lines += ["", *ranks_table(found["ranks"])]
    if "overlap" in found:
        lines += ["", overlap_line(found["overlap"])]
    return top + "\n".join(lines) + "\n"


def ranks_table(ranks: list[dict[str, float]]) -> list[str]:
    """Seconds of each stage on every rank: "other" is mostly waiting for ranks that take longer."""
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    lines = [f"| rank | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for number, rank in enumerate(ranks):
        cells = [f"{rank[name]:.3g}" if name in rank else "" for name in names]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    return lines


def overlap_line(found: dict[str, float]) -> str:
    """What scoring elsewhere cost the update."""
    whole, run, scoring = (found[f"{name}_s"] for name in ("update", "run", "scoring"))
    return (
        f"Scoring: busy {scoring:.3g} s of the update's {whole:.3g} s, of which the run waited "
        f"{whole - run:.3g} s: the update is {found['of_the_longer']:.3f} times the longer half "
        f"(run {run:.3g} s, scoring {scoring:.3g} s)."
    )


def scaling_table(found: dict[str, Any]) -> str:
    """One line a run: seconds, and the share of what perfect scaling would give."""
    lines = ["| scaling | ranks | seconds an update | of ideal |", "|---|---|---|---|"]
    for run, share in zip(found["runs"], efficiencies(found), strict=True):
        span = f"{run['update']['median_s']:.3g}"
        lines.append(f"| {run['kind']} | {run['ranks']} | {span} | {share:.2f} |")
    return head(found) + "\n\n" + "\n".join(lines) + "\n"


def efficiencies(found: dict[str, Any]) -> list[float]:
    """Share of perfect scaling of each run, against the fewest ranks of its kind.

    Strong: time falls as ranks rise. Weak: time stays.
    """
    shares = []
    for run in found["runs"]:
        least = min((r for r in found["runs"] if r["kind"] == run["kind"]), key=_ranks)
        ratio = least["update"]["median_s"] / run["update"]["median_s"]
        more = run["ranks"] / least["ranks"]
        shares.append(ratio / more if run["kind"] == "strong" else ratio)
    return shares


def _ranks(run: dict[str, Any]) -> int:
    return int(run["ranks"])


def head(found: dict[str, Any]) -> str:
    """A title, the command, the machine and the versions."""
    machine = found["machine"]
    return (
        f"# {found['name']}\n\n`{found['command']}`\n\n{machine['ranks']} x {machine['device']}, "
        f"commit {found['commit'][:12] or 'unknown'}, torch {found['versions']['torch']}, "
        f"megatron-core {found['versions']['megatron-core']}, {found['date']}. "
    )


def stage_figure(found: dict[str, Any]) -> Figure:
    """One bar: the update, cut into its stages. If others scored: below it, who did what when."""
    lanes = found.get("timeline", {}).get("lanes", {})
    if len(lanes) < 2:
        figure = Figure(figsize=(9, 2.2), dpi=110, layout="constrained")
        bar = figure.subplots()
    else:
        heights = (1.5, 0.9 + 0.4 * len(lanes))
        figure = Figure(figsize=(9, 0.7 + sum(heights)), dpi=110, layout="constrained")
        bar, below = figure.subplots(2, height_ratios=heights)
        lane_rows(below, found, lanes)
    names = stage_bar(bar, found)
    figure.draw_without_rendering()  # lays out
    for patch, name in names:
        if name.get_window_extent().width > patch.get_window_extent().width - 4:
            name.remove()
    return figure


def stage_bar(axes: Axes, found: dict[str, Any]) -> list[tuple[Rectangle, Text]]:
    """The stages one behind the other, as long as their median; the parts that bear their name."""
    left, names = 0.0, []
    parts = [(n, p["median_s"]) for n, p in found["stages"].items()]
    total = sum(seconds for _, seconds in parts)
    for (name, seconds), colour in zip(parts, _COLOURS, strict=False):
        (patch,) = axes.barh([0], [seconds], left=left, color=colour,
                             label=f"{name} {seconds:.3g} s")  # fmt: skip
        if seconds > 0.06 * total:
            text = axes.text(left + seconds / 2, 0, name, ha="center", va="center", color="white")
            names.append((patch, text))
        left += seconds
    axes.set(yticks=[], xlabel=f"seconds of an update ({found['name']})", xlim=(0, total))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=5, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return names


def lane_rows(axes: Axes, found: dict[str, Any], lanes: dict[str, list[Any]]) -> None:
    """A row a lane, the run's on top: its spans in the colours of `stage_bar`."""
    colours = dict(zip(found["stages"], _COLOURS, strict=False))
    for row, (lane, spans) in enumerate(lanes.items()):
        bars = [(start, stop - start) for _, start, stop in spans]
        faces = [_SCORING if lane != "run" else colours.get(name, "#000000") for name, *_ in spans]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=faces)
    overlap = found["overlap"]
    axes.set(
        yticks=range(len(lanes)), ylim=(len(lanes) - 0.5, -0.5), xlim=(0, overlap["update_s"]),
        yticklabels=[lane.replace("http://", "").replace(" ", "\n", 1) for lane in lanes],
        xlabel=f"seconds since the update began: {overlap['of_the_longer']:.3f} times the longer "
               f"of run ({overlap['run_s']:.3g} s) and scoring ({overlap['scoring_s']:.3g} s)",
    )  # fmt: skip
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)


def scaling_figure(found: dict[str, Any]) -> Figure:
    """Share of ideal over ranks, strong and weak."""
    figure = Figure(figsize=(5, 3.2), dpi=110, layout="constrained")
    axes, shares = figure.subplots(), efficiencies(found)
    for kind, colour in zip(("strong", "weak"), _COLOURS, strict=False):
        points = [
            (r["ranks"], s) for r, s in zip(found["runs"], shares, strict=True) if r["kind"] == kind
        ]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=kind)
    axes.axhline(1.0, color="#8a8d93", linewidth=0.8)
    axes.set(xlabel="ranks", ylabel="share of ideal", ylim=(0, 1.1),
             xticks=sorted({r["ranks"] for r in found["runs"]}))  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
