"""What a generated video leaves: a file of frames or of latents, and a record of what it cost."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_kvpo import log, settings
from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.video_file import VideoWriter
from megatron_kvpo.parallel.groups import Ranks, is_first
from megatron_kvpo.stopwatch import Stopwatch
from tools import provenance

logger = log.get_logger("megatron_kvpo.tools.generate")


def find_output(options: argparse.Namespace) -> VideoWriter | LatentWriter:
    """What the output's suffix asks for. ValueError for one that is neither."""
    if options.output.suffix == ".safetensors":
        return LatentWriter(options.output)
    return VideoWriter(options.output, options.fps, options.scale)


def decoding_device(place: str, ranks: Ranks) -> torch.device:
    """Where --decode-on has the VAE. ValueError for no device, one that is not there, or ranks."""
    if ranks.world > 1:
        raise ValueError(
            f"--decode-on {place} is for one process, this one is of {ranks.world}: leave it out, "
            "then every rank decodes on its own device"
        )
    try:
        device = torch.device(place)
    except RuntimeError as error:
        raise ValueError(f"--decode-on {place} names no device: cuda:1, say") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--decode-on {place}: there are {count} CUDA devices here")
    return device


class LatentWriter:
    """Clean latents of one video, written when it is closed: `latent_FCHW`."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_frames = path, 0
        self._blocks: list[Tensor] = []

    def write(self, latent_BFCHW: Tensor) -> None:
        """Append the next block."""
        self._blocks.append(latent_BFCHW[0].cpu())
        self.num_frames += latent_BFCHW.shape[1]

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._blocks and kind in (None, KeyboardInterrupt):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            save_file({"latent_FCHW": torch.cat(self._blocks).contiguous()}, partial)
            os.replace(partial, self.path)


class Clock:
    """Seconds of each stage; on a GPU what was asked of it has ended when a stage has."""

    def __init__(self, device: torch.device) -> None:
        self.stages: dict[str, list[float]] = {}
        self._started = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def elapsed(self) -> float:
        """Seconds since this clock was made."""
        return time.monotonic() - self._started

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add what happens inside to a stage."""
        with Stopwatch() as watch:
            yield
        self.stages.setdefault(stage, []).append(watch.seconds)


def record(
    config: RunConfig, ranks: Ranks, num_frames: int, clock: Clock, options: argparse.Namespace
) -> None:
    """Write timings and peak memory as JSON, and the distance to --compare. First rank only."""
    if not is_first(ranks):
        return
    found: dict[str, Any] = {
        "name": options.record.stem,
        **provenance.made_by("tools.generate", ranks.world),
        "latent_frames": num_frames,
    }
    for stage, seconds in clock.stages.items():
        later = sorted(seconds[1:] or seconds)  # the first one warms up
        found[f"{stage}_s"] = {"repeats": len(later), "min": later[0], "max": later[-1],
                               "median": later[len(later) // 2]}  # fmt: skip
    if ranks.device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(ranks.device) / 2**30
    if options.compare is not None:
        own = load_file(options.output)["latent_FCHW"].double()
        other = load_file(options.compare)["latent_FCHW"].double()
        if own.shape != other.shape:
            raise ValueError(
                f"{options.compare} holds {list(other.shape)}, this video is {list(own.shape)}"
            )
        per_frame = (own - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
        found["compared_with"] = str(options.compare)
        found["relative_difference"] = float((own - other).norm() / other.norm())
        found["relative_difference_last_block"] = float(per_frame[-1])
        logger.info("relative difference to %s: %.2e", options.compare,
                    found["relative_difference"])  # fmt: skip
    found["config"] = settings.to_mapping(config)
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(json.dumps(found, indent=1, default=str) + "\n")
