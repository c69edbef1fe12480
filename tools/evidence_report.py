"""From finished runs of the experiment's arms to checks, a table, a plot and filmstrips.

Every comparison is paired by prompt and noise, pooled over seeds and clustered by prompt
(training/summary.py), in standard deviations of the base's scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from megatron_kvpo import log
from megatron_kvpo.training.filmstrips import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    RED,
    Filmstrips,
    comparison_figure,
)
from megatron_kvpo.training.report import Curve, read_curves, save_figure, smooth, tidy
from megatron_kvpo.training.summary import EvaluationTable, contrast, paired_gain

logger = log.get_logger("megatron_kvpo.tools.evidence")

LEAST_GAIN_SD, LEAST_CONTRAST_SD, LEAST_Z = 0.2, 0.25, 3.0
_COLOURS = {"real": BLUE, "shuffled": ORANGE, "negated": RED, "lr0": GREY}
_REWARD = "reward/composite"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one finished run left."""

    arm: str
    seed: int
    summary: Mapping[str, Any]
    before: EvaluationTable
    after: EvaluationTable
    reward: Curve | None
    held_out: tuple[str, ...]
    folder: Path
    provenance: Mapping[str, Any]

    @classmethod
    def read(cls, arm: str, seed: int, folder: Path) -> Run:
        """Load a run's folder. ValueError if a table is missing."""
        config = yaml.safe_load((folder / "config.yaml").read_text())
        took = folder / "provenance.json"
        return cls(
            arm=arm,
            seed=seed,
            summary=json.loads((folder / "summary.json").read_text()),
            before=EvaluationTable.load(folder / "evaluation_before.npz"),
            after=EvaluationTable.load(folder / "evaluation_after.npz"),
            reward=read_curves(folder / "metrics.jsonl").get(_REWARD),
            held_out=tuple(config["reward"]["held_out"]),
            folder=folder,
            provenance=json.loads(took.read_text()) if took.is_file() else {},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that has to hold."""

    name: str
    passed: bool | None
    """None: an arm it needs was not run."""

    found: str


def write(runs: Sequence[Run], provenance: Mapping[str, Any], folder: Path) -> int:
    """Write the JSON, the table, the plot and the filmstrips. 1 if a check failed, else 0."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = judge(runs)
    result = {
        "checks": [asdict(check) for check in checks],
        "contrasts": contrasts(runs),
        "runs": [figures(run) for run in runs],
        "colour": colour_figures(runs),
        **provenance,
    }
    text = json.dumps(_jsonable(result), indent=1, allow_nan=False)
    (folder / "evidence_shapes.json").write_text(text + "\n")
    (folder / "evidence_shapes.md").write_text(table(runs, checks, provenance))
    save_figure(plot(runs), folder / "evidence_shapes.png")
    strips = filmstrips(runs)
    if strips is not None:
        save_figure(strips, folder / "evidence_filmstrips.png")
    for check in checks:
        verdict = "not run" if check.passed is None else "pass" if check.passed else "FAIL"
        logger.info("%-8s %s: %s", verdict, check.name, check.found)
    return int(any(check.passed is False for check in checks))


def judge(runs: Sequence[Run]) -> list[Check]:
    """The issue's conditions, in its order."""
    arms = _by_arm(runs)
    rules: list[tuple[str, tuple[str, ...], Callable[[], tuple[bool, str]]]] = [
        (f"mean gain at least {LEAST_GAIN_SD} SD", ("real",), lambda: _mean_gain(arms)),
        ("every seed's gain above 0", ("real",), lambda: _every_seed(arms)),
        (f"real - shuffled at least {LEAST_CONTRAST_SD} SD, z at least {LEAST_Z:g}",
         ("real", "shuffled"), lambda: _real_over_shuffled(arms)),
        ("negated below shuffled", ("negated", "shuffled"), lambda: _negated_below(arms)),
        ("lr 0 changes nothing at all", ("lr0",), lambda: _unmoved(arms)),
    ]  # fmt: skip
    rules.append(("arms of a seed start at the same scores", (), lambda: _same_start(runs)))
    for name in runs[0].held_out:
        rules.append((f"held-out {name} falls by no more than one standard error", ("real",),
                      lambda name=name: _held_out_kept(arms, name)))  # type: ignore[misc]  # fmt: skip
    checks = []
    for name, needed, rule in rules:
        if all(arm in arms for arm in needed):
            passed, found = rule()
            checks.append(Check(name=name, passed=bool(passed), found=found))
        else:
            checks.append(Check(name=name, passed=None, found=f"needs the arms {list(needed)}"))
    return checks


def _mean_gain(arms: Mapping[str, Sequence[Run]]) -> tuple[bool, str]:
    gain = float(np.mean([paired_gain(run.before, run.after).gain_sd for run in arms["real"]]))
    return gain >= LEAST_GAIN_SD, f"{gain:+.3f} SD over {len(arms['real'])} seeds"


def _every_seed(arms: Mapping[str, Sequence[Run]]) -> tuple[bool, str]:
    gains = {run.seed: paired_gain(run.before, run.after).gain_sd for run in arms["real"]}
    words = ", ".join(f"seed {seed}: {gain:+.3f}" for seed, gain in gains.items())
    return min(gains.values()) > 0, words


def _real_over_shuffled(arms: Mapping[str, Sequence[Run]]) -> tuple[bool, str]:
    found = _between(arms, "real", "shuffled")
    passed = found["mean_sd"] >= LEAST_CONTRAST_SD and found["z"] >= LEAST_Z
    return passed, f"{found['mean_sd']:+.3f} ± {found['standard_error']:.3f} SD, z {found['z']:.1f}"


def _negated_below(arms: Mapping[str, Sequence[Run]]) -> tuple[bool, str]:
    found = _between(arms, "negated", "shuffled")
    return found["mean_sd"] < 0, (
        f"negated - shuffled {found['mean_sd']:+.3f} ± {found['standard_error']:.3f} SD, "
        f"z {found['z']:.1f}"
    )


def _unmoved(arms: Mapping[str, Sequence[Run]]) -> tuple[bool, str]:
    moved = [float(np.abs(r.after.score_KRM - r.before.score_KRM).max()) for r in arms["lr0"]]
    return max(moved) == 0, f"largest change of any score of any video {max(moved):g}"


def _same_start(runs: Sequence[Run]) -> tuple[bool, str]:
    first: dict[int, Run] = {}
    apart = 0.0
    for run in runs:
        start = first.setdefault(run.seed, run).before
        apart = max(apart, float(np.abs(run.before.score_KRM - start.score_KRM).max()))
    return apart == 0, f"largest difference {apart:g}"


def _held_out_kept(arms: Mapping[str, Sequence[Run]], name: str) -> tuple[bool, str]:
    real = arms["real"]
    base = [run.before for run in real]
    change = contrast([run.after for run in real], base, base, name)
    return change.mean_sd >= -change.standard_error, (
        f"{change.mean_sd:+.3f} ± {change.standard_error:.3f} SD"
    )


def contrasts(runs: Sequence[Run]) -> dict[str, Any]:
    """Paired differences between arms, composite and per reward, over the seeds both have."""
    arms = _by_arm(runs)
    pairs = [("real", "shuffled"), ("negated", "shuffled"), ("real", "negated")]
    names: list[str | None] = [None, *runs[0].before.components]
    return {
        f"{one} - {other}": {
            name or "composite": _between(arms, one, other, name) for name in names
        }
        for one, other in pairs
        if one in arms and other in arms
    }


def _between(
    arms: Mapping[str, Sequence[Run]], one: str, other: str, component: str | None = None
) -> dict[str, Any]:
    first, second = ({run.seed: run for run in arms[arm]} for arm in (one, other))
    seeds = sorted(set(first) & set(second))
    result = contrast(
        [first[s].after for s in seeds],
        [second[s].after for s in seeds],
        [first[s].before for s in seeds],
        component,
    )
    return asdict(result)


def figures(run: Run) -> dict[str, Any]:
    """All of one run's numbers; gains are computed anew from its tables."""
    gain = paired_gain(run.before, run.after)
    return {"arm": run.arm, "seed": run.seed, **run.summary, "gain_sd": gain.gain_sd,
            "standard_error": gain.standard_error, "provenance": dict(run.provenance)}  # fmt: skip


def colour_figures(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Brightness, saturation and clipping of the shown videos: does a gain push colours?

    All in [0, 1]: mean over pixels of max(RGB), of max - min, and of "a channel is 254 or 255".
    """
    found = {}
    run = next((run for run in runs if run.arm == "real"), runs[0])
    for name in ("real", "before", "after"):
        strips = Filmstrips.load(run.folder / "filmstrips" / f"{name}.npz")
        if strips is None:
            continue
        frames = strips.frames_RFHWC.astype(np.float64)
        high, low = frames.max(axis=-1), frames.min(axis=-1)
        found["rendered" if name == "real" else name] = {
            "brightness": float(high.mean() / 255),
            "saturation": float((high - low).mean() / 255),
            "clipped": float((high >= 254).mean()),
        }
    return found


def table(runs: Sequence[Run], checks: Sequence[Check], provenance: Mapping[str, Any]) -> str:
    """The evidence as Markdown."""
    names = list(runs[0].before.components)
    titles = [f"{n} (held out)" if n in runs[0].held_out else n for n in names]
    table_R, table_M = runs[0].before.composite_RM.shape
    lines = [
        "# Shapes: is the gain the method's?",
        "",
        f"{table_R} held-out prompts x {table_M} noises, the same before and after and in every "
        "arm. Gains are changes of the mean in standard deviations (SD) of the base's scores, "
        "± one standard error clustered by prompt.",
        "",
        f"Made by `{provenance.get('command', '')}` at commit `{provenance.get('commit', '')}`.",
        "",
        "| check | found | |",
        "|---|---|---|",
    ]
    for check in checks:
        verdict = "not run" if check.passed is None else "pass" if check.passed else "**fail**"
        lines.append(f"| {check.name} | {check.found} | {verdict} |")
    heads = ["arm", "seed", "before", "after", "gain, SD", *titles, "s/update"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for run in runs:
        gain = paired_gain(run.before, run.after)
        parts = [f"{paired_gain(run.before, run.after, n).gain_sd:+.3f}" for n in names]
        cells = [run.arm, str(run.seed), f"{gain.before:.4f}", f"{gain.after:.4f}",
                 f"{gain.gain_sd:+.3f} ± {gain.standard_error:.3f}", *parts,
                 f"{run.summary['seconds_per_update']:.2f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| paired difference, SD | mean | standard error | z |", "|---|---|---|---|"]
    for pair, members in contrasts(runs).items():
        for name, entry in members.items():
            lines.append(f"| {pair}, {name} | {entry['mean_sd']:+.3f} | "
                         f"{entry['standard_error']:.3f} | {entry['z']:.1f} |")  # fmt: skip
    pictures = "![gains and learning curves](evidence_shapes.png)"
    return "\n".join([*lines, "", pictures, "", "![before, after](evidence_filmstrips.png)", ""])


def plot(runs: Sequence[Run]) -> Figure:
    """Gain by arm and seed with 95 % bars, and the mean training reward of each arm."""
    arms = _by_arm(runs)
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (arm, members) in enumerate(arms.items()):
        gains = [paired_gain(run.before, run.after) for run in members]
        colour = _COLOURS.get(arm, INK)
        left.bar(place, np.mean([g.gain_sd for g in gains]), 0.7, color=colour, alpha=0.35)
        for offset, run, gain in zip(
            np.linspace(-0.22, 0.22, len(gains)), members, gains, strict=True
        ):
            left.errorbar(place + offset, gain.gain_sd, 1.96 * gain.standard_error, fmt="o",
                          color=colour, markersize=5, capsize=3, lw=1.2)  # fmt: skip
            left.annotate(str(run.seed), (place + offset, gain.gain_sd), (5, 3), fontsize=7,
                          textcoords="offset points", color=INK)  # fmt: skip
        curves = [run.reward for run in members if run.reward is not None]
        if curves:
            _learning_curve(right, curves, colour, arm)
    left.axhline(0, color=INK, linewidth=0.8)
    left.axhline(LEAST_GAIN_SD, color=INK, linewidth=0.8, linestyle=":")
    left.set_xticks(range(len(arms)), list(arms))
    tidy(left, "gain on held-out prompts by arm and seed, 95 %", "", "SD of the base")
    tidy(right, "reward while training, mean over seeds, 95 %", "update", "composite")
    if right.lines:
        right.legend(fontsize=8, frameon=False)
    return figure


def _learning_curve(axes: Any, curves: Sequence[Curve], colour: str, label: str) -> None:
    length = min(len(value) for _, value in curves)
    width = max(3, length // 8)
    smoothed = np.stack([smooth(value[:length], width)[0] for _, value in curves])
    mean = smoothed.mean(axis=0)
    axes.plot(curves[0][0][:length], mean, color=colour, linewidth=2, label=label)
    if len(curves) > 1:
        band = 1.96 * smoothed.std(axis=0, ddof=1) / math.sqrt(len(curves))
        axes.fill_between(curves[0][0][:length], mean - band, mean + band, color=colour, alpha=0.15,
                          lw=0)  # fmt: skip


def filmstrips(runs: Sequence[Run]) -> Figure | None:
    """The base beside the trained model, same prompts and noises, first seed of the real arm."""
    run = next((run for run in runs if run.arm == "real"), runs[0])
    columns = []
    for name in ("before", "after"):
        strips = Filmstrips.load(run.folder / "filmstrips" / f"{name}.npz")
        if strips is None:
            logger.warning("no filmstrips in %s: evidence_filmstrips.png is left out", run.folder)
            return None
        columns.append({name: strips})
    return comparison_figure(columns, num_shown=6)


def _by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def _jsonable(value: Any) -> Any:
    """The same with infinite numbers as text, which JSON has no other way to hold."""
    if isinstance(value, Mapping):
        return {key: _jsonable(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(member) for member in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
