"""The table and the plot of a benchmark, made from its JSON and nothing else.

python -m tools.benchmark_report FILE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tools import provenance

_COLOURS = ("#2f6fdb", "#e07b39", "#3c9d6b", "#b04ea5", "#8a8d93", "#d4b106", "#4bb3c1", "#c0392b",
            "#7f6df2")  # fmt: skip


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
    return top + "\n".join(lines) + "\n"


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
    """One bar: the update, cut into its stages."""
    figure = Figure(figsize=(9, 2.2), dpi=110, layout="constrained")
    axes, left = figure.subplots(), 0.0
    parts = [(n, p["median_s"]) for n, p in found["stages"].items()]
    total = sum(seconds for _, seconds in parts)
    for (name, seconds), colour in zip(parts, _COLOURS, strict=False):
        axes.barh([0], [seconds], left=left, color=colour, label=f"{name} {seconds:.3g} s")
        if seconds > 0.06 * total:
            axes.text(left + seconds / 2, 0, name, ha="center", va="center", color="white")
        left += seconds
    axes.set(yticks=[], xlabel=f"seconds of an update ({found['name']})", xlim=(0, total))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(ncols=5, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


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
