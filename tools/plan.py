"""What a recipe takes on machines that it has not seen: memory by term, seconds by stage, layouts.

    python -m tools.plan examples/wan/benchmark_longlive_1.3b.yaml --gpu H200 --gpus 8
    python -m tools.plan RECIPE --topology 32xh200_1.3b policy.groups_per_update=8
    python -m tools.plan --check                                # every committed record
    python -m tools.plan --check docs/benchmarks/update/h100/1.3b_scored.json --json check.json
    python -m tools.plan RECIPE --scaling 1,2,4,8,16,32 --json scaling.json

Passes are counted by the run's own stages, their seconds come from measured passes. Fails, with
--check, if a prediction is off by more than 15 % of the time or 5 % of the memory.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kvpo import log
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.records import Prompt
from tools import plan_check, plan_scaling, provenance
from tools.plan_count import count, prompts_of
from tools.plan_layouts import (
    H100,
    H200,
    Layout,
    Machines,
    candidates,
    illegal,
    machines,
    place_of,
    read_topology,
    too_large,
)
from tools.plan_memory import Memory
from tools.plan_rates import load_rates
from tools.plan_time import Update, cases, scores_elsewhere, scoring_costs, update_seconds

logger = log.get_logger("megatron_kvpo.tools.plan")

_MODULE = "tools.plan"

BEST = 3


@dataclass(frozen=True, slots=True)
class Option:
    """A layout and what it would take."""

    layout: Layout
    memory: Memory
    update: Update
    notes: tuple[str, ...]
    """What its seconds were put together from."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All layouts of a recipe on some machines."""

    topology: Machines
    options: list[Option]
    """Legal ones, the fastest first."""

    refused: list[tuple[Layout, str]]
    """The others, and why."""

    notes: list[str]
    """Of the best ones, and of these machines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, check or scale; 1 if a check fails. ValueError for what cannot be planned."""
    options = _parse(arguments)
    log.setup(first=True)
    if options.check is not None:
        return _check(options)
    if options.recipe is None:
        raise ValueError("name a recipe, or give --check")
    config = load_config(options.recipe, options.overrides)
    kind = read_topology(options.topology) if options.topology else _KINDS[options.gpu]
    if options.scaling:
        found = plan_scaling.scaling(config, kind, options.scaling, options.forks, make)
        logger.info("\n%s", plan_scaling.table(found))
    else:
        topology = machines(kind, options.gpus) if options.gpus else kind
        plan = make(config, topology, options.forks)
        logger.info("\n%s", table(config, plan))
        found = [to_mapping(plan)]
    _write(options, {"plans": found})
    return 0


_KINDS = {"H200": H200, "H100": H100}


def make(config: RunConfig, topology: Machines, forks: Sequence[int] | None = None) -> Plan:
    """Every layout, weighed. `forks`: those that count; None is all legal ones."""
    rates, prompts = load_rates(topology.gpu), prompts_of(config)
    options, refused = [], []
    for layout in candidates(config, topology.gpus):
        why = illegal(config, topology, layout)
        if why is None:
            found, why = _memory(config, topology, layout, prompts, forks)
        if why is not None:
            refused.append((layout, why))
            continue
        rates.notes.clear()
        update = update_seconds(rates, config, topology, layout, prompts, forks=forks,
                                recomputed=found.recomputed)  # fmt: skip
        options.append(Option(layout, found, update, tuple(sorted(rates.notes))))
    options.sort(key=lambda option: option.update.seconds)
    return Plan(topology, options, refused, _notes(options[:BEST], topology))


def _memory(
    config: RunConfig, topology: Machines, layout: Layout, prompts: tuple[Prompt, ...],
    forks: Sequence[int] | None,
) -> tuple[Memory, str | None]:  # fmt: skip
    """Of the rank that lends fewest pages, at the first fork that may be."""
    (_, prompt, fork, _), *_ = cases(config, prompts, forks)
    lent = count(config, prompt, fork, layout.parallel.branch).lent
    judges = 0.0 if scores_elsewhere(config) else scoring_costs(config)[1]
    place = place_of(config, topology, layout, lent=lent, reward_gib=judges)
    return too_large(config, prompts, place)


def _notes(options: Sequence[Option], topology: Machines) -> list[str]:
    found = sorted({note for option in options for note in option.notes})
    if topology.gpus > 2:
        found.append("no update on more than two GPUs was measured")
    if topology.nodes > 1:
        found.append(f"InfiniBand was not measured: {topology.ib_gb_s:g} GB/s a GPU are assumed")
    return found


def table(config: RunConfig, plan: Plan) -> str:
    """For people: the best layouts in full, the others in a line."""
    topology, groups = plan.topology, config.policy.groups_per_update
    lines = [
        f"{config.name} on {topology.nodes} x {topology.gpus_per_node} {topology.gpu}, "
        f"{groups} prompt{'s' * (groups > 1)} an update\n"
    ]
    for number, option in enumerate(plan.options[:BEST], start=1):
        lines += _in_full(number, option)
    best = plan.options[0].update.seconds if plan.options else 0.0
    for option in plan.options[BEST:]:
        seconds, cause = option.update.seconds, _worst(option.update)
        lines.append(
            f"slower   {option.layout}: {seconds:.1f} s, +{seconds / best - 1:.0%}: {cause}"
        )
    lines += [f"illegal  {layout}: {why}" for layout, why in plan.refused]
    lines += [f"note     {note}" for note in plan.notes]
    return "\n".join(lines)


def _in_full(number: int, option: Option) -> list[str]:
    memory, update = option.memory, option.update
    stages = ", ".join(f"{name} {s:.2f}" for name, s in update.stages.items() if s >= 0.005)
    terms = ", ".join(f"{name} {gib:.2f}" for name, gib in memory.terms.items() if gib >= 0.005)
    lost = ", ".join(f"{name} {s:.2f}" for name, s in update.lost.items() if s >= 0.005)
    again = f", {memory.recomputed:.0%} of the blocks recompute" if memory.recomputed else ""
    return [
        f"{number}. {option.layout}: {update.seconds:.1f} s, {memory.peak:.1f} GiB",
        f"   seconds: {stages}",
        f"   lost: {lost}",
        f"   GiB in {memory.moment}: {terms}{again}\n",
    ]


def _worst(update: Update) -> str:
    name = max(update.lost, key=lambda name: update.lost[name])
    return f"{name} takes {update.lost[name]:.1f} s"


def to_mapping(plan: Plan) -> dict[str, Any]:
    """For JSON."""
    return {
        "topology": dataclasses.asdict(plan.topology),
        "best": [option_mapping(option) for option in plan.options[:BEST]],
        "slower": [
            {"layout": str(o.layout), "seconds": o.update.seconds, "why": _worst(o.update)}
            for o in plan.options[BEST:]
        ],
        "illegal": [{"layout": str(layout), "why": why} for layout, why in plan.refused],
        "notes": plan.notes,
    }


def option_mapping(option: Option) -> dict[str, Any]:
    """A layout with its seconds and GiB."""
    return {
        "layout": str(option.layout), "seconds": option.update.seconds,
        "stages_s": option.update.stages, "lost_s": option.update.lost,
        "peak_gib": option.memory.peak, "memory_gib": option.memory.terms,
        "moment": option.memory.moment, "recomputed": option.memory.recomputed,
        "notes": option.notes,
    }  # fmt: skip


def _check(options: argparse.Namespace) -> int:
    paths = options.check or None
    found = plan_check.check_files(paths) if paths else plan_check.check_all()
    logger.info("\n%s", plan_check.table(found))
    failed = [c.name for c in found if not c.holds]
    logger.info("%d of %d predictions hold%s", len(found) - len(failed), len(found),
                f"; not {', '.join(failed)}" if failed else "")  # fmt: skip
    _write(options, {"checks": [plan_check.to_mapping(c) for c in found]})
    return 1 if failed else 0


def _write(options: argparse.Namespace, found: dict[str, Any]) -> None:
    if options.json is not None:
        head = {"name": options.json.stem, **provenance.made_by(_MODULE, 1)}
        provenance.write_json({**head, **found}, options.json)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--topology", help="a name in launch/topologies, or a file")
    parser.add_argument("--gpu", choices=sorted(_KINDS), default="H200", help="without a topology")
    parser.add_argument("--gpus", type=int, help="of them; default: one machine, or the topology's")
    parser.add_argument("--forks", type=_numbers, metavar="N,N",
                        help="latent frames of forks; default: all legal ones")  # fmt: skip
    parser.add_argument("--scaling", type=_numbers, metavar="N,N",
                        help="the best layout on so many GPUs, weak and strong")  # fmt: skip
    parser.add_argument("--check", type=Path, nargs="*", metavar="JSON",
                        help="compare with these records; none: all committed")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write what was found")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    log.run_command(main, logger)
