"""Run a dumped group again on one device; compare it, branch by branch, with what the run saw.

    python -m tools.replay_group runs/demo/dumps/update_00000012 [--prompt 7] [section.key=value]

The run dumps an update before an alarm, or figures that are not finite, end it; alarms.dump_updates
names others. Here its prefix is filled from the dumped latents, its branches are rolled out once
more, and the dumped trajectory is replayed by all policies: latents, energies, advantages and the
terms of the loss should be the run's, but for rounding where ranks or batches were others. Settings
are the run's; overrides come last, so `model.dtype=float32` tells what precision does, and
`device=cpu` needs no GPU. A reward service is not asked, but has to be there if the recipe has one.

One line of JSON a group on stdout. Exit code 1 if a figure differs by more than --tolerance of its
largest value.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.checkpoint.state import load
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.parallel.groups import stop_ranks
from megatron_kvpo.rollout.group import SampledGroup, roll_out_group
from megatron_kvpo.training.group_dump import Dumped, Figures, loss_parts, read_group
from megatron_kvpo.training.policy import WEIGHTS
from megatron_kvpo.training.run import Run

logger = log.get_logger(__name__)

ALONE = (
    "parallel.tensor=1", "parallel.context=1", "parallel.branch=1",
    "parallel.sequence_parallel=false", "optimizer.distributed=false", "evaluation.prompts=null",
    "policy.groups_per_update=1", "checkpoint.every=0", "checkpoint.resume=never",
    "log.wandb=disabled", "log.tensorboard=false", "log.costs=false",
    "log.samples_every=0", "log.report=false", "heartbeat.limit_s=0",
)  # fmt: skip
"""What one device needs, and what has no place in a replay."""


def settings_of(folder: Path, overrides: list[str], scratch: str) -> RunConfig:
    """The dumped run's, on one rank. ValueError if `folder` is no dump."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path} is missing: name a folder dumps/update_<number> of a run")
    return load_config(path, [*ALONE, f"folder={scratch}", "name=replay", *overrides])


def load_weights(run: Run, folder: Path) -> None:
    """All slots as the update found them. ValueError if they do not fit or are damaged."""
    (path,) = sorted((folder / "weights").glob("step_*")) or [folder / "weights" / "step_"]
    tree = {name: x for name, x in run.policy.sharded_state().items() if name in WEIGHTS}
    run.policy.load_weights(load(path, tree, run.ranks))


def replayed(run: Run, dumped: Dumped) -> tuple[dict[str, Tensor], Tensor]:
    """Figures of the group as this device makes them, and its latents rolled out once more."""
    group, config, stages = dumped.group, run.config, run.stages
    fork = group.plan.fork_frame
    given = dataclasses.replace(group.prompt, video=Path("dump"), video_frames=fork, clip=None)
    with run.policy.acting("old"):
        rolled = roll_out_group(
            stages.world, stages.encode, given, group.plan,
            stages.noises(dumped.update, group.prompt.index), group.sequences,
            config.policy.rollout_rows, lambda _: group.latent_NFCHW[:1, :fork],
        )  # fmt: skip
    sampled = SampledGroup(group, rolled.prefix)
    energies = run.energies(dumped.update, [sampled])
    figures = Figures(energies=energies)
    if dumped.table is not None:
        advantage_PG, scale_P, _ = stages.advantages(dumped.update, [sampled], [dumped.table])
        figures = Figures(energies=energies, tables=[dumped.table], advantage_PG=advantage_PG,
                          scale_P=scale_P)  # fmt: skip
    sampled.release()
    return figures.row(0), rolled.own.latent_NFCHW


def compared(dumped: Dumped, row: dict[str, Tensor], latent: Tensor, config: RunConfig) -> Any:
    """Run and replay side by side: figures, terms of the loss, and the largest differences."""
    ours, theirs = loss_parts(row, config), dumped.loss
    both = {name: (dumped.row[name], row[name]) for name in row if name in dumped.row}
    both["latent_NFCHW"] = dumped.group.latent_NFCHW, latent
    if isinstance(ours, dict) and isinstance(theirs, dict):
        both |= {n: (torch.tensor(theirs[n]), x) for n, x in ours.items() if n in theirs}
    shown = {n: {"run": a.tolist(), "replay": b.tolist()} for n, (a, b) in both.items()
             if n != "latent_NFCHW" and not n.endswith("_KN")}  # fmt: skip
    if isinstance(ours, str) or isinstance(theirs, str):
        shown["loss"] = {"run": theirs if isinstance(theirs, str) else "finite",
                         "replay": ours if isinstance(ours, str) else "finite"}  # fmt: skip
    return {"update": dumped.update, "prompt": dumped.group.prompt.index, **shown,
            "difference": {name: difference(a, b) for name, (a, b) in both.items()}}  # fmt: skip


def difference(run: Tensor, replay: Tensor) -> float:
    """Largest |run - replay| over the run's largest |value|; places that are nan in both agree.

    Infinite where only one of them is finite.
    """
    run, replay = run.detach().double().cpu(), replay.detach().double().cpu()
    same = (run == replay) | (run.isnan() & replay.isnan())
    if bool(same.all()):
        return 0.0
    apart = (run - replay)[~same].abs().nan_to_num(torch.inf).max()
    largest = run[run.isfinite()].abs().amax() if bool(run.isfinite().any()) else run.new_ones(())
    return float(apart / largest.clamp(min=torch.finfo(torch.float32).tiny))


def tell(found: dict[str, Any], num_branches: int) -> None:
    """A line for each branch, to read; the JSON goes to stdout."""
    per_branch = {n: x for n, x in found.items() if n.startswith("energy") or n.endswith("_G")}
    for branch in range(num_branches):
        parts = [f"{name.removesuffix('_N').removesuffix('_G')} {x['run'][branch]:.6g} "
                 f"({x['replay'][branch]:.6g})" for name, x in per_branch.items()]  # fmt: skip
        logger.info("prompt %d branch %d, run (replay): %s", found["prompt"], branch,
                    ", ".join(parts))  # fmt: skip
    log.emit_result(json.dumps(found))


def main(arguments: list[str] | None = None) -> int:
    """The command. 1 if run and replay differ by more than the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="dumps/update_<number> of a run")
    parser.add_argument("--prompt", type=int, help="its number in the file of prompts; default all")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.glob("prompt_*.json"))
    if options.prompt is not None:
        paths = [options.folder / f"prompt_{options.prompt:05d}.json"]
    if not paths:
        raise ValueError(f"{options.folder} holds 0 groups: name dumps/update_<number> of a run")
    with tempfile.TemporaryDirectory() as scratch:
        run = Run.start(settings_of(options.folder, options.overrides, scratch))
        try:
            load_weights(run, options.folder)
            worst = 0.0
            for path in paths:
                dumped = read_group(path, run.ranks.device)
                found = compared(dumped, *replayed(run, dumped), run.config)
                tell(found, run.config.routing.num_branches)
                worst = max(worst, *found["difference"].values())
        finally:
            stop_ranks()
            log.setup(True)
    logger.info("largest difference %.3g, tolerance %.3g", worst, options.tolerance)
    return int(worst > options.tolerance)


if __name__ == "__main__":
    log.run_command(main, logger) if len(sys.argv) > 1 else main(["--help"])
