"""How far energies, ratios and gradients move when rollout and replay compute in fewer bits.

    python -m tools.precision examples/shapes/demo.yaml --output precision.json
    python -m tools.precision examples/wan/benchmark_longlive_1.3b.yaml device=cuda --groups 1 \
        --updates 1 --modes bfloat16,fp8_ffn,merged --output wan.json

All modes have the same weights, seeds, prompts, plans and noises. The first one named is the
yardstick of the others, so name float32 first where its pages fit. One mode's model lives at a
time; what it leaves waits in main memory. Adapters act: their B are drawn unless the recipe names
one (--stir 0: fresh ones, as a run starts). Writes the JSON, a Markdown table and a plot beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_kvpo import log, settings
from megatron_kvpo.algorithm.energy import step_energy
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.flow import sampler_sigmas
from megatron_kvpo.model.lora import adapters_of
from megatron_kvpo.parallel.seeds import device_generator, noise
from megatron_kvpo.records import RolloutGroup, Trajectory
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.rollout.replay import Push, replay, replay_targets
from megatron_kvpo.rollout.sampler import context_state, encode_for_rows, encode_segment
from megatron_kvpo.rollout.stream import Stream
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.run import Run
from tools import precision_report, provenance
from tools.benchmark import quiet
from tools.precision_statistics import GroupTrace, Move, Replayed, compare, slopes

logger = log.get_logger("megatron_kvpo.tools.precision")

_MODULE = "tools.precision"

SMALL_RATE = 1e-5
"""The learning rate of Wan's recipes, beside the recipe's own."""


WAYS: tuple[Literal["gradient", "chance"], ...] = ("gradient", "chance")
"""See Move.along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bits:
    """Settings that say how many bits a run computes in."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: tuple[Literal["ffn", "attention", "text"], ...] = ()
    merge: bool = False


MODES: dict[str, Bits] = {
    "float32": Bits(dtype="float32"),
    "bfloat16": Bits(),
    "fp8_ffn": Bits(fp8=("ffn",)),
    "fp8_all": Bits(fp8=("ffn", "attention", "text")),
    "merged": Bits(merge=True),
    "fp8_merged": Bits(fp8=("ffn", "attention", "text"), merge=True),
}
"""model.dtype, model.fp8 and policy.merge by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. ValueError for options or a recipe that cannot run so."""
    options = _parse(arguments)
    _check_options(options)
    config = load_config(options.recipe, options.overrides)
    _check_recipe(config, options)
    precision_report.write(measure(config, options), options.output)
    return 0


def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """All modes, one after the other, each compared with the first."""
    moves = planned_moves(config, options)
    sigmas = sampler_sigmas(config.stream.steps, config.stream.shift)
    yardstick: list[GroupTrace] = []
    modes: dict[str, Any] = {}
    for name in options.modes:
        started = time.perf_counter()
        found = trace(config, MODES[name], options, yardstick)
        _free_memory()
        yardstick = yardstick or found
        figures = compare(found, yardstick, sigmas, moves, config)
        modes[name] = {
            **dataclasses.asdict(MODES[name]), "seconds": time.perf_counter() - started, **figures
        }  # fmt: skip
        logger.info("%s: %.0f s", name, modes[name]["seconds"])
    return {
        "name": options.output.stem,
        **provenance.made_by(_MODULE, 1),
        "yardstick": options.modes[0],
        "groups": len(yardstick),
        "branches": config.routing.num_branches,
        "stir": 0.0 if config.policy.adapter else options.stir,
        "sigmas": sigmas,
        "modes": modes,
        "config": settings.to_mapping(config),
    }


def planned_moves(config: RunConfig, options: argparse.Namespace) -> list[Move]:
    """Both ways, every rate with every number of steps, smallest first; of equal products one."""
    rates = options.rates or (SMALL_RATE, config.optimizer.lr)
    sizes = {f"{rate * steps:.9g}": (rate, steps) for rate in rates for steps in options.steps}
    moves = [Move(along, *size) for along in WAYS for size in sizes.values()]
    return sorted(moves, key=lambda move: (WAYS.index(move.along), move.size))


def trace(
    config: RunConfig, bits: Bits, options: argparse.Namespace, yardstick: Sequence[GroupTrace]
) -> list[GroupTrace]:
    """What one mode makes of all groups, on the CPU. Without a yardstick it is one itself."""
    found: list[GroupTrace] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        _running(in_mode(config, bits, options.groups, Path(folder))) as run,
    ):
        if config.policy.adapter is None:
            stir(run.policy, options.stir)
        tracer = Tracer(run, planned_moves(config, options))
        for update in range(options.updates):
            found += tracer.update(update, yardstick[len(found) : len(found) + options.groups])
    return found


def in_mode(config: RunConfig, bits: Bits, groups: int, folder: Path) -> RunConfig:
    """The recipe in these bits, without evaluation, checkpoints and reports."""
    return dataclasses.replace(
        quiet(config, folder),
        model=dataclasses.replace(config.model, dtype=bits.dtype, fp8=bits.fp8),
        policy=dataclasses.replace(config.policy, merge=bits.merge, groups_per_update=groups),
    )


@contextmanager
def _running(config: RunConfig) -> Iterator[Run]:
    """A run of one rank."""
    run = Run.start(config, on_device=True)
    try:
        if run.ranks.world > 1:
            raise ValueError(f"{run.ranks.world} ranks run {_MODULE}: it takes 1, without torchrun")
        yield run
    finally:
        run.finish(0.0)
        log.setup(True)  # the folder of run.log goes


def _free_memory() -> None:
    """Model and pages of a run that nobody holds any more: they lie in cycles."""
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def stir(policy: Policy, size: float) -> None:
    """Move all slots off the base alike: their B become normal with standard deviation `size`."""
    for name, adapter in adapters_of(policy.model).items():
        up = adapter.lora_B["current"]
        rng = device_generator(up.device, _MODULE, name)
        drawn = size * torch.randn(up.shape, generator=rng, device=up.device)
        for held in adapter.lora_B.values():
            held.copy_(drawn)


@torch.no_grad()
def move(policy: Policy, step: Move, gradient: Tensor) -> None:
    """Shift every trained number of the current policy. `gradient`: one vector of all of them.

    Chance is the same at every call: a longer step goes further the same way.
    """
    held = policy.optimizer.parameters
    parts = torch.split(gradient, [parameter.numel() for parameter in held])
    for number, (parameter, part) in enumerate(zip(held, parts, strict=True)):
        if step.along == "gradient":
            way = -part.to(parameter.device).view_as(parameter)
        else:
            rng = device_generator(parameter.device, _MODULE, "move", number)
            way = torch.randn(parameter.shape, generator=rng, device=parameter.device)
        parameter.add_(way.sign(), alpha=step.size)


class Tracer:
    """One mode's run, and what is asked of it."""

    def __init__(self, run: Run, moves: Sequence[Move]) -> None:
        self._policy, self._stages, self._config = run.policy, run.stages, run.config
        self._device, self._moves = run.ranks.device, moves

    def update(self, update: int, yardstick: Sequence[GroupTrace]) -> list[GroupTrace]:
        """The groups of one update. Without a yardstick its own states and gradients count."""
        own = self._stages.explore(update)
        mine = self._replayed(update, own, "old")
        kept = [_on(sampled.group, torch.device("cpu")) for sampled in own]
        recorded = [one.group for one in yardstick] or kept
        given = [
            SampledGroup(_on(group, self._device), sampled.prefix)
            for group, sampled in zip(recorded, own, strict=True)
        ]
        drifted = self._replayed(update, given, "old")
        given = [self._refilled(update, sampled) for sampled in given]
        common = self._replayed(update, given, "old")
        advantages = [self._advantage(update, sampled.group) for sampled in given]
        gradients = [
            self._gradient(update, sampled, found.branch_G, advantage_G)
            for sampled, found, advantage_G in zip(given, common, advantages, strict=True)
        ]
        down = torch.stack([one.gradient for one in yardstick] or gradients).sum(dim=0)
        moved = [self._moved(update, given, step, down) for step in self._moves]
        for sampled in given:
            sampled.release()
        return [
            GroupTrace(
                group=kept[i], own_NT=mine[i].energy_NT, drifted=drifted[i], common=common[i],
                advantage_G=advantages[i], gradient=gradients[i],
                moved=tuple(groups[i] for groups in moved),
            )
            for i in range(len(kept))
        ]  # fmt: skip

    def _replayed(self, update: int, groups: Sequence[SampledGroup], slot: str) -> list[Replayed]:
        found = self._stages.energies(update, groups, slot, keep=True)
        return [
            Replayed(step_energies(sampled, velocity, self._config), velocity.cpu())
            for sampled, velocity in zip(groups, found.velocities, strict=True)
        ]

    def _moved(
        self, update: int, groups: Sequence[SampledGroup], step: Move, gradient: Tensor
    ) -> list[Replayed]:
        """Replays by the current policy after a step; it is taken back."""
        move(self._policy, step, gradient)
        found = self._replayed(update, groups, "current")
        self._policy.bank.copy("old", "current")
        return found

    @torch.no_grad()
    def _refilled(self, update: int, sampled: SampledGroup) -> SampledGroup:
        """The same group behind a prefix whose cache is filled with the group's own latents.

        The prefix that it had is released.
        """
        sampled.release()
        group, world, encode = sampled.group, sampled.prefix.world, self._stages.encode
        noises = self._stages.noises(update, group.prompt.index)
        latent_1FCHW = group.latent_NFCHW[-1:]
        with self._policy.acting("old"):
            text = encode_segment(world.model, encode, [group.prompt], 0)
            stream = Stream.begin(world, 1, text)
            for frame in range(0, group.plan.fork_frame + 1, world.stream.block_frames):
                if frame in group.prompt.switch_frames:
                    text = encode_for_rows(world.model, encode, group.prompt, frame, 1)
                    stream.recache(text, latent_1FCHW[:, :frame])
                if frame < group.plan.fork_frame:
                    clean = latent_1FCHW[:, frame : frame + world.stream.block_frames]
                    context = context_state(clean, world.stream, noises.key(frame))
                    stream.commit(context, sigma=world.stream.context_noise)
        return SampledGroup(group, stream)

    def _advantage(self, update: int, group: RolloutGroup) -> Tensor:
        """Drawn advantages, the same in every mode."""
        drawn_G = noise(
            (self._config.routing.num_branches,), self._config.seed, update, group.prompt.index,
            _MODULE, "advantage",
        )  # fmt: skip
        return drawn_G - drawn_G.mean()

    def _gradient(
        self, update: int, sampled: SampledGroup, energy_G: Tensor, advantage_G: Tensor
    ) -> Tensor:
        """Gradient of a group's loss, on policy, in all that trains: one vector."""
        optimizer, most = self._policy.optimizer, self._config.policy.max_rows
        noises = self._stages.noises(update, sampled.group.prompt.index)
        slope_G = slopes(energy_G, energy_G, advantage_G, self._config).to(self._device)
        optimizer.zero_grad()
        with self._policy.acting("current"):
            for first in range(0, len(slope_G), most):
                rows = range(first, min(first + most, len(slope_G)))
                push = Push(weight_B=slope_G[rows.start : rows.stop])
                replay(sampled, self._stages.encode, noises, self._config.energy, rows, push=push)
        gradients = [p.main_grad for p in optimizer.parameters]  # type: ignore[attr-defined]
        return torch.cat([gradient.flatten().cpu() for gradient in gradients])


def step_energies(sampled: SampledGroup, velocity_NPTFCHW: Tensor, config: RunConfig) -> Tensor:
    """Energies by denoising step, summed over blocks: [N, T] on the CPU."""
    taken = replay_targets(sampled).velocity_NPTFCHW
    sigmas = sampler_sigmas(config.stream.steps, config.stream.shift)
    steps = []
    for step, sigma in enumerate(sigmas):
        blocks = [
            step_energy(velocity_NPTFCHW[:, block, step], taken[:, block, step], sigma,
                        config.energy)
            for block in range(taken.shape[1])
        ]  # fmt: skip
        steps.append(torch.stack(blocks).sum(dim=0))
    return torch.stack(steps, dim=1).cpu()


def _on(group: RolloutGroup, device: torch.device) -> RolloutGroup:
    trajectory = Trajectory(
        state_NPTFCHW=group.trajectory.state_NPTFCHW.to(device),
        velocity_NPTFCHW=group.trajectory.velocity_NPTFCHW.to(device),
    )
    latent_NFCHW = group.latent_NFCHW.to(device)
    return dataclasses.replace(group, trajectory=trajectory, latent_NFCHW=latent_NFCHW)


def _check_options(options: argparse.Namespace) -> None:
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} must end in .json")
    unknown = [name for name in options.modes if name not in MODES]
    if unknown or not options.modes or len(set(options.modes)) < len(options.modes):
        raise ValueError(
            f"--modes {','.join(options.modes)!r}: name each once, the yardstick first, from "
            f"{list(MODES)}"
        )
    if min(options.groups, options.updates) < 1:
        raise ValueError(
            f"--groups {options.groups} and --updates {options.updates} must be at least 1"
        )
    if not options.steps or min(options.steps) < 1:
        raise ValueError(f"--steps {options.steps}: name numbers of steps from 1 up, --steps 1,10")
    if options.rates and min(options.rates) <= 0:
        raise ValueError(f"--rates {options.rates}: a learning rate is above 0")
    if options.stir < 0:
        raise ValueError(f"--stir {options.stir} must not be negative")


def _check_recipe(config: RunConfig, options: argparse.Namespace) -> None:
    if config.policy.mode != "lora":
        raise ValueError(
            f"policy.mode is {config.policy.mode}: fewer bits are for a frozen base, set "
            "policy.mode to lora"
        )
    if config.routing.exploration == "none":
        raise ValueError(
            "routing.exploration is none: its branches are alike and have no energies to compare, "
            "set chr or noise"
        )
    if not options.rates and config.optimizer.lr == 0:
        raise ValueError("optimizer.lr is 0: no step can be taken with it, name some by --rates")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--modes", type=_names, default=list(MODES),
                        help="the yardstick first; of " + ", ".join(MODES))  # fmt: skip
    parser.add_argument("--groups", type=int, default=8, help="prompts of an update")
    parser.add_argument("--updates", type=int, default=2, help="whose prompts and noises are used")
    parser.add_argument("--steps", type=_numbers, default=[1, 10, 100],
                        help="numbers of optimizer steps to move by")  # fmt: skip
    parser.add_argument("--rates", type=_rates,
                        help="their learning rates; default: the recipe's and 1e-5")  # fmt: skip
    parser.add_argument("--stir", type=float, default=0.01,
                        help="deviation of the adapters' B if none is named; 0: fresh")  # fmt: skip
    return parser.parse_intermixed_args(arguments)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


if __name__ == "__main__":
    log.run_command(main, logger)
