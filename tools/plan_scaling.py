"""The best layout on ever more GPUs: as many prompts as before, and as many for each GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from megatron_kvpo.config import RunConfig
from tools.plan_layouts import Machines, machines

Maker = Callable[[RunConfig, Machines, Sequence[int] | None], Any]
"""tools.plan.make."""


def scaling(
    config: RunConfig, kind: Machines, sizes: Sequence[int], forks: Sequence[int] | None,
    make: Maker,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a size and kind, the best layout of each.

    `strong`: the recipe's prompts an update on all sizes. `weak`: one prompt for as many GPUs as
    one prompt needs at least. Efficiency is prompts a GPU and second against the smallest size.

    ValueError: sizes that are no whole machines, none of them fits.
    """
    found: list[dict[str, Any]] = []
    unit = _unit(config, kind, sizes, forks, make)
    for mode in ("weak", "strong"):
        base = 0.0
        for size in sizes:
            groups = max(1, size // unit) if mode == "weak" else config.policy.groups_per_update
            plan = make(_with_groups(config, groups), machines(kind, size), forks)
            if not plan.options:
                found.append({"gpus": size, "kind": mode, "groups": groups, "layout": None,
                              "why": _reason([why for _, why in plan.refused])})  # fmt: skip
                continue
            best = plan.options[0]
            rate = groups / best.update.seconds / size
            base = base or rate
            found.append({
                "gpus": size, "kind": mode, "groups": groups, "layout": str(best.layout),
                "seconds": best.update.seconds, "prompts_an_hour": 3600 * rate * size,
                "efficiency": rate / base, "peak_gib": best.memory.peak,
                "stages_s": best.update.stages, "lost_s": best.update.lost,
                "memory_gib": best.memory.terms, "notes": best.notes,
            })  # fmt: skip
    return found


def _reason(refused: Sequence[str]) -> str:
    """Memory's, if that is one: other layouts are refused on any machines."""
    return next((why for why in refused if "GiB" in why), refused[0])


def _unit(
    config: RunConfig, kind: Machines, sizes: Sequence[int], forks: Sequence[int] | None,
    make: Maker,
) -> int:  # fmt: skip
    """Fewest GPUs that one prompt fits on."""
    for size in sizes:
        if make(_with_groups(config, 1), machines(kind, size), forks).options:
            return size
    raise ValueError(f"{config.name} fits on none of {list(sizes)} GPUs: give larger sizes")


def _with_groups(config: RunConfig, groups: int) -> RunConfig:
    policy = dataclasses.replace(config.policy, groups_per_update=groups)
    return dataclasses.replace(config, policy=policy)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: what each size takes and loses most by."""
    lines = [
        "| GPUs | prompts | layout | s an update | prompts an hour | efficiency | GiB | lost most "
        "by, seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        head = f"| {row['gpus']} ({row['kind']}) | {row['groups']} "
        if row["layout"] is None:
            lines.append(f"{head}| none: {row['why']} | | | | | |")
            continue
        lost = sorted(row["lost_s"].items(), key=lambda pair: -pair[1])[:2]
        causes = ", ".join(f"{name} {seconds:.1f}" for name, seconds in lost)
        lines.append(
            f"{head}| {row['layout']} | {row['seconds']:.1f} | {row['prompts_an_hour']:.0f} "
            f"| {row['efficiency']:.0%} | {row['peak_gib']:.0f} | {causes} |"
        )
    return "\n".join(lines) + "\n"
