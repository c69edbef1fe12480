"""What scoring a group's clips costs, reward by reward, without decoding.

    python -m tools.benchmark_rewards RECIPE [section.key=value ...] --output rewards.json
    python -m tools.benchmark_rewards RECIPE "reward.weights={hpsv3: 1}" --output hpsv3.json

Clips are those that a recipe's first prompt and a fork in its middle ask for, in random pixels.
tools/random_rewards.py writes models of random weights. Writes the JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_kvpo import log, settings
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.parallel.seeds import device_generator
from megatron_kvpo.records import Clip, RolloutGroup, RoutingPlan, Trajectory
from megatron_kvpo.reward.base import Reward, build_rewards
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.routing import legal_forks
from megatron_kvpo.world import pixel_start
from tools import benchmark_report, provenance
from tools.benchmark_kernels import call_times, median

logger = log.get_logger("megatron_kvpo.tools.benchmark_rewards")

_MODULE = "tools.benchmark_rewards"
_SPATIAL_STRIDE = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. ValueError for options or a recipe that cannot run so."""
    options = _parse(arguments)
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} must end in .json")
    if min(options.repeats, options.warmup) < 1:
        raise ValueError(
            f"--repeats {options.repeats} and --warmup {options.warmup} must be at least 1"
        )
    log.setup(True)
    found = measure(load_config(options.recipe, options.overrides), options)
    provenance.write_json(found, options.output)
    options.output.with_suffix(".md").write_text(table(found))
    return 0


def measure(config: RunConfig, options: argparse.Namespace) -> dict[str, Any]:
    """The record of every reward, trained and held out."""
    cuda = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    fork = options.fork or _middle(legal_forks(config.stream, config.routing))
    clips = clips_of(config, fork, device)
    names = (*config.reward.weights, *config.reward.held_out)
    parts = []
    for reward in build_rewards(names, config.reward, device):
        parts.append(_timed(reward, clips, device, options))
        logger.info("%s: %.4g s", ", ".join(parts[-1]["components"]), parts[-1]["median_s"])
    return {
        "name": options.output.stem, **provenance.made_by(_MODULE, 1), "fork": fork,
        "clips": len(clips), "pixel_frames": sum(len(clip.frames_FCHW) for clip in clips),
        "rewards": parts, "config": settings.to_mapping(config),
    }  # fmt: skip


class _Listener:
    """A judge that keeps the clips that it is sent."""

    def __init__(self, components: Sequence[str]) -> None:
        self.components, self.clips = tuple(components), list[Clip]()

    def submit(self, clips: Sequence[Clip], names: Sequence[str]) -> Any:
        """See Judge.submit."""
        self.clips += clips
        return lambda: torch.zeros(len(names), len(clips))


def clips_of(config: RunConfig, fork: int, device: torch.device) -> list[Clip]:
    """Clips of one group, as the Scorer cuts them; all rows show the same random pixels."""
    prompt = load_prompts(config.data.prompts)[0]
    rows, frames = config.routing.num_branches + 1, config.stream.num_frames
    shape = (pixel_start(frames), 3, *config.model.pixel_size(_SPATIAL_STRIDE))
    pixels = torch.rand(shape, generator=device_generator(device, _MODULE), device=device)
    empty = torch.zeros(rows, 1, 1, 1, 1, 1, 1)
    group = RolloutGroup(
        prompt=prompt, plan=RoutingPlan(fork_frame=fork, num_blocks=1, routed_frames_G=()),
        latent_NFCHW=torch.zeros(rows, frames, 1, 1, 1, device=device),
        trajectory=Trajectory(state_NPTFCHW=empty, velocity_NPTFCHW=empty),
        sequences=tuple(range(rows)),
    )  # fmt: skip
    listener = _Listener((*config.reward.weights, *config.reward.held_out))
    scorer = Scorer(
        config.reward, config.stream,
        lambda latent, _: (pixels[None, : pixel_start(latent.shape[1])] for _ in latent),
        [listener],
    )  # fmt: skip
    scorer.send_group(group)
    return listener.clips


def _timed(
    reward: Reward, clips: Sequence[Clip], device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    call_times(lambda: reward.score(clips), device, options.warmup)
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [ms / 1000 for ms in call_times(lambda: reward.score(clips), device, options.repeats)]
    memory = {}
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        memory = {"held_memory_gib": held / 2**30, "peak_memory_gib": peak / 2**30}
    return {
        "components": list(reward.components), "repeats": len(times), "min_s": min(times),
        "median_s": median(times), "max_s": max(times),
        "ms_per_clip": 1000 * median(times) / len(clips), **memory,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """One line a reward."""
    lines = [
        f"{benchmark_report.head(found)}{found['clips']} clips of {found['pixel_frames']} pixel "
        f"frames in all: a group that forks at {found['fork']}.\n",
        "| components | seconds a group: median (min to max) | ms a clip | held GiB | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for part in found["rewards"]:
        span = f"{part['median_s']:.3g} ({part['min_s']:.3g} to {part['max_s']:.3g})"
        memory = [f"{part[n]:.1f}" if n in part else "" for n in ("held_memory_gib",
                                                                   "peak_memory_gib")]  # fmt: skip
        names = ", ".join(part["components"])
        lines.append(f"| {names} | {span} | {part['ms_per_clip']:.3g} | {' | '.join(memory)} |")
    return "\n".join(lines) + "\n"


def _middle(forks: Sequence[int]) -> int:
    return forks[len(forks) // 2]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--fork", type=int, help="latent frame; default: the middle legal one")
    parser.add_argument("--repeats", type=int, default=3, help="that count")
    parser.add_argument("--warmup", type=int, default=1, help="that do not")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    log.run_command(main, logger)
