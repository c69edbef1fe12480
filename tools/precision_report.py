"""The tables and the plot of tools.precision, made from its JSON and nothing else.

python -m tools.precision_report FILE.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from tools import provenance

_COLOURS = ("#2f6fdb", "#e07b39", "#c0392b", "#3c9d6b", "#b04ea5", "#8a8d93")
_MARKS = ("o", "s", "D", "^", "v", "P")
_EXACT = 1e-9
"""An error below this share of its value is rounding."""


def write(found: dict[str, Any], path: Path) -> None:
    """Write the record, and its tables (.md) and plot (.png) beside it."""
    provenance.write_json(found, path)
    draw(path)


def draw(path: Path) -> None:
    """Make tables and plot of a JSON anew."""
    found = json.loads(path.read_text())
    path.with_suffix(".md").write_text(tables(found))
    figure(found).savefig(path.with_suffix(".png"))


def tables(found: dict[str, Any]) -> str:
    """All tables, each with what its columns say."""
    parts = [_head(found), *_own(found), *_common(found), *_levels(found), *_moves(found)]
    return "\n".join(parts) + "\n"


def _head(found: dict[str, Any]) -> str:
    machine, stir = found["machine"], found["stir"]
    adapters = f"adapters' B drawn, deviation {stir:g}" if stir else "adapters as they start"
    return (
        f"# {found['name']}\n\n`{found['command']}`\n\n{machine['device']}, commit "
        f"{found['commit'][:12] or 'unknown'}, torch {found['versions']['torch']}, "
        f"{found['date']}. {found['groups']} groups of {found['branches']} branches, {adapters}. "
        f"All figures are against {found['yardstick']} of the same weights, prompts, plans and "
        "noises, ± one standard error over groups.\n"
    )


def _others(found: dict[str, Any]) -> dict[str, Any]:
    """The modes that are compared, without the yardstick."""
    return {name: mode for name, mode in found["modes"].items() if name != found["yardstick"]}


def _own(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "## Own rollouts\n\nEvery mode rolls its groups out and replays them. Videos drift apart, "
        "so energies are of other states. Rank correlation is Spearman's within a group.\n"
    )
    yield _header("mode", "anchor's energy", "branches' energy", "bias", "correlation",
                  "rank correlation", "prefix differs by", "seconds")  # fmt: skip
    for name, mode in found["modes"].items():
        own = mode["self"]
        whole = own["all_levels"]
        yield _row(
            name, f"{whole['anchor_energy_max']:.3g}", _show(whole["energy"]),
            _percent(whole["bias"]), _show(whole["correlation"]), _show(whole["rank_correlation"]),
            _percent(own["prefix_difference"]), f"{mode['seconds']:.0f}",
        )  # fmt: skip


def _common(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "\n## The same states\n\nEvery mode replays the yardstick's states and velocities behind "
        "a prefix of the yardstick's latents, whose cache it fills itself. Contrast: energies less "
        "their group's mean, all that the policy sees. Floor: the anchor's energy over a branch's, "
        "0 without error. c: slopes of the loss in the energies, on policy. Gradient: of a group's "
        "loss in all adapters.\n"
    )
    yield _header("mode", "energies' bias", "floor", "error of contrast", "rank correlation",
                  "behind its own prefix", "largest change of pi", "error of c",
                  "gradient's cosine", "of all groups' sum")  # fmt: skip
    for name, mode in _others(found).items():
        common, whole = mode["common"], mode["common"]["all_levels"]
        yield _row(
            name, _percent(whole["bias"]), _percent(whole["anchor_share"]),
            _percent(whole["contrast_error"]), _show(whole["rank_correlation"]),
            _show(mode["own_prefix"]["all_levels"]["rank_correlation"]),
            f"{common['policy_difference_max']:.2g} of {common['policy_spread_max']:.2g}",
            _percent(common["loss_slope_error"]), _show(mode["gradient"]["cosine"]),
            _plain(mode["gradient"]["cosine_of_sum"]),
        )  # fmt: skip


def _levels(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "\n## By noise level\n\nVelocity: relative error, with the yardstick's prefix and with its "
        "own. Energies: of the same states.\n"
    )
    yield _header("mode", "sigma", "velocity", "with its own prefix", "energies' bias", "floor",
                  "error of contrast", "rank correlation")  # fmt: skip
    for name, mode in _others(found).items():
        for level in mode["common"]["levels"]:
            yield _row(
                name, f"{level['sigma']:.4g}", _percent(level["velocity_error"]),
                _percent(level["velocity_error_own_prefix"]), _percent(level["bias"]),
                _percent(level["anchor_share"]), _percent(level["contrast_error"]),
                _show(level["rank_correlation"]),
            )  # fmt: skip


def _moves(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "\n## After a step\n\nEvery trained number moves by rate x steps: down the yardstick's "
        "gradient by its sign, as AdamW's first step goes, or up or down by chance. Log ratios of "
        "the branches and changes of the velocities against the yardstick's: slope of least "
        "squares (1: nothing is lost on average), correlation or cosine; difference: root mean "
        "square, as the size is. c: as above; it jumps where a ratio crosses the clip.\n"
    )
    yield _header("along", "rate x steps", "size of log ratio", "mode", "difference", "slope",
                  "correlation", "velocity: slope", "cosine", "error of c")  # fmt: skip
    for number, step in enumerate(next(iter(found["modes"].values()))["moves"]):
        for name, mode in _others(found).items():
            move = mode["moves"][number]
            yield _row(
                step["along"], f"{step['rate']:g} x {step['steps']}",
                _plain(step["log_ratio_size"]), name, _show(move["difference"]),
                _show(move["slope"]), _show(move["correlation"]),
                _show(move["velocity"]["slope"]), _show(move["velocity"]["cosine"]),
                _percent(move["loss_slope_error"]),
            )  # fmt: skip


def _header(*names: str) -> str:
    return f"{_row(*names)}\n{'|---' * len(names)}|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _show(figure: dict[str, Any], scale: float = 1.0) -> str:
    """Value ± error, both to the error's first digit, or its second if the first is a 1."""
    value, error = figure["value"], figure["standard_error"]
    if value is None or not error or error < _EXACT * abs(value):
        return _plain(value if value is None else scale * value)
    digits = max(0, -math.floor(math.log10(scale * error / 2)))
    return f"{scale * value:.{digits}f} ± {scale * error:.{digits}f}"


def _percent(figure: dict[str, Any]) -> str:
    shown = _show(figure, 100.0)
    return f"{shown}%" if shown else ""


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def figure(found: dict[str, Any]) -> Figure:
    """Error of velocities and of energies over noise level; of velocities' changes over steps."""
    made = Figure(figsize=(12.5, 3.9), dpi=110, layout="constrained")
    velocity, energy, change = made.subplots(1, 3)
    for (name, mode), colour, mark in zip(_others(found).items(), _COLOURS, _MARKS, strict=False):
        style = {"color": colour, "marker": mark, "label": name, "markersize": 4.5}
        levels = mode["common"]["levels"]
        sigmas = [level["sigma"] for level in levels]
        _line(velocity, sigmas, [level["velocity_error"] for level in levels], style)
        _line(energy, sigmas, [level["contrast_error"] for level in levels], style)
        for along, line in (("gradient", "-"), ("chance", ":")):
            moves = [move for move in mode["moves"] if move["along"] == along]
            _line(change, [move["rate"] * move["steps"] for move in moves],
                  [move["velocity"]["cosine"] for move in moves], {**style, "linestyle": line},
            )  # fmt: skip
    for axes in (velocity, energy):
        axes.set(yscale="log", xlabel="noise level sigma")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_minor_formatter(NullFormatter())
    velocity.set(ylabel=f"velocity: error against {found['yardstick']}")
    energy.set(ylabel="energies less their group's mean: error")
    change.set(xscale="log", ylabel="velocity's change after a step: cosine", ylim=(None, 1.03),
               xlabel="step down the gradient (dotted: by chance)")  # fmt: skip
    for axes in (velocity, energy, change):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e8e8ea", linewidth=0.6)
    if _others(found):
        velocity.legend(frameon=False, fontsize=8)
    return made


def _line(
    axes: Axes, x: Sequence[float], figures: Sequence[dict[str, Any]], style: dict[str, Any]
) -> None:
    """Figures with their standard errors; what is not defined is left out."""
    points = sorted((a, f["value"], f["standard_error"] or 0.0)
                    for a, f in zip(x, figures, strict=True) if f["value"] is not None)  # fmt: skip
    if points:
        place, value, error = zip(*points, strict=True)
        axes.errorbar(place, value, yerr=error, linewidth=1.2, capsize=2, **style)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
