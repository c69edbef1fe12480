"""An update's groups on disk, with all that the run made of them, to take apart on one device.

    dumps/update_00000012/config.yaml               the run's settings
    dumps/update_00000012/weights/step_00000012/    all slots' weights, readable under any layout
    dumps/update_00000012/prompt_00007.safetensors  one group's latents, trajectory and figures
    dumps/update_00000012/prompt_00007.json         its prompt and plan, and the parts of its loss

`python -m tools.replay_group` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_kvpo import settings
from megatron_kvpo.algorithm.loss import energy_weights
from megatron_kvpo.checkpoint.state import save
from megatron_kvpo.config import RunConfig
from megatron_kvpo.log import get_logger
from megatron_kvpo.parallel.groups import Ranks, is_first
from megatron_kvpo.records import (
    Energies,
    Prompt,
    RewardTable,
    RolloutGroup,
    RoutingPlan,
    Trajectory,
)
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.training.policy import WEIGHTS, Policy

logger = get_logger(__name__)

POLICIES = ("current", "old", "reference")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a run made of some groups. None: it had not come so far, or has no use for it."""

    energies: tuple[Energies, Energies, Energies | None]
    """Of POLICIES."""

    tables: Sequence[RewardTable] | None = None
    advantage_PG: Tensor | None = None
    scale_P: Tensor | None = None

    def row(self, place: int) -> dict[str, Tensor]:
        """One group's: energy_<policy>_N (the anchor's last), scores, advantage_G and scale."""
        found = {}
        for name, energies in zip(POLICIES, self.energies, strict=True):
            if energies is not None:
                found[f"energy_{name}_N"] = energies.energy_N(place)
        if self.tables is not None:
            found["local_KN"] = self.tables[place].local_KN
            found["global_KN"] = self.tables[place].global_KN
        if self.advantage_PG is not None and self.scale_P is not None:
            found |= {"advantage_G": self.advantage_PG[place], "scale": self.scale_P[place]}
        return found

    def is_finite(self) -> bool:
        """Whether all energies of branches and all advantages are."""
        values = [energies.branch_PG for energies in self.energies if energies is not None]
        values += [] if self.advantage_PG is None else [self.advantage_PG]
        return all(bool(value.isfinite().all()) for value in values)


def loss_parts(row: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor] | str:
    """The loss of one group by itself: its terms, and weight_G = dL/dE_g; or why it has none."""
    if "advantage_G" not in row:
        return "not come so far"
    branches = {name: row[f"energy_{name}_N"][None, :-1].float().cpu()
                for name in POLICIES if f"energy_{name}_N" in row}  # fmt: skip
    try:
        output, weight_PG = energy_weights(
            branches["current"], branches["old"], branches.get("reference"),
            row["advantage_G"][None].float().cpu(), row["scale"][None].float().cpu(),
            config.energy.temperature, config.loss,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return {**output.metrics, "loss/total": output.loss, "weight_G": weight_PG[0]}


def dump(
    config: RunConfig, ranks: Ranks, policy: Policy, update: int, groups: Sequence[SampledGroup],
    figures: Figures,
) -> Path:  # fmt: skip
    """Write this update's groups and weights; every data rank its groups. Collective."""
    folder = config.run_folder / "dumps" / f"update_{update:08d}"
    whole = [sampled.group for sampled in groups]  # collective over branch ranks, the first time
    state = policy.sharded_state()
    kept = {name: part for name, part in state.items() if name in WEIGHTS}
    save(folder / "weights", update, kept, ranks, keep=1)
    if is_first(ranks):
        settings.dump(config, folder / "config.yaml")
    if ranks.tensor.rank == ranks.context.rank == ranks.branch.rank == 0:
        for place, group in enumerate(whole):
            _write(folder, config, update, group, figures, place)
    if is_first(ranks):
        logger.warning("update %d is in %s: see python -m tools.replay_group", update, folder)
    return folder


def _write(
    folder: Path, config: RunConfig, update: int, group: RolloutGroup, figures: Figures, place: int
) -> None:
    row, prompt = figures.row(place), group.prompt
    tensors = {"latent_NFCHW": group.latent_NFCHW, "state_NPTFCHW": group.trajectory.state_NPTFCHW,
               "velocity_NPTFCHW": group.trajectory.velocity_NPTFCHW, **row}  # fmt: skip
    path = folder / f"prompt_{prompt.index:05d}"
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
              path.with_suffix(".safetensors"))  # fmt: skip
    table = figures.tables[place] if figures.tables is not None else None
    parts = loss_parts(row, config)
    told = {
        "update": update, "seed": config.seed,
        "prompt": {**asdict(prompt), "video": None if prompt.video is None else str(prompt.video)},
        "plan": asdict(group.plan), "sequences": list(group.sequences),
        "components": None if table is None else list(table.components),
        "weights": None if table is None else list(table.weights),
        "loss": parts if isinstance(parts, str) else {k: v.tolist() for k, v in parts.items()},
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dumped:
    """One group as it was."""

    update: int
    group: RolloutGroup
    row: dict[str, Tensor]
    """See Figures.row."""

    table: RewardTable | None
    loss: dict[str, Any] | str
    """See loss_parts."""


def read_group(path: Path, device: torch.device) -> Dumped:
    """The group of a prompt_<number>.json. ValueError if it or its tensors are not there."""
    tensors = path.with_suffix(".safetensors")
    if not path.is_file() or not tensors.is_file():
        raise ValueError(f"{path} and {tensors.name} are no dumped group: name a prompt_*.json")
    told, row = json.loads(path.read_text()), load_file(tensors, device=str(device))
    prompt, plan = told["prompt"], told["plan"]
    group = RolloutGroup(
        prompt=Prompt(**{**prompt, "segments": tuple(prompt["segments"]),
                         "switch_frames": tuple(prompt["switch_frames"]),
                         "video": prompt["video"] and Path(prompt["video"])}),
        plan=RoutingPlan(**{**plan, "routed_frames_G": tuple(map(tuple, plan["routed_frames_G"]))}),
        latent_NFCHW=row.pop("latent_NFCHW"), sequences=tuple(told["sequences"]),
        trajectory=Trajectory(state_NPTFCHW=row.pop("state_NPTFCHW"),
                              velocity_NPTFCHW=row.pop("velocity_NPTFCHW")),
    )  # fmt: skip
    table = None
    if told["components"] is not None:
        table = RewardTable(components=tuple(told["components"]), weights=tuple(told["weights"]),
                            local_KN=row["local_KN"], global_KN=row["global_KN"])  # fmt: skip
    return Dumped(update=told["update"], group=group, row=row, table=table, loss=told["loss"])
