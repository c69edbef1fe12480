"""The prompts of a run, and which of them each update uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_kvpo.config import StreamConfig
from megatron_kvpo.parallel.seeds import generator
from megatron_kvpo.records import Prompt

T = TypeVar("T")

EXAMPLE = '{"segments": ["a red square moves right", "it turns blue"], "switch_frames": [9]}'
CONTINUATION = '{"segments": ["it turns blue"], "video": "clips/0001.mp4", "video_frames": 12}'


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read JSON lines of `segments`, `switch_frames`, `video`, `clip` and `video_frames`.

    Other keys are ignored. `Prompt.index` is the line's place in the file, from 0; a video's path
    counts from the file's folder. Raises ValueError with file, line
    number and remedy for a missing or empty file, bad JSON, missing or ill-typed keys.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no prompt file at {file}: write one JSON object a line, as {EXAMPLE}")
    prompts = [
        _parse(line, index, f"{file} line {index + 1}", file.parent)
        for index, line in enumerate(file.read_text(encoding="utf-8").splitlines())
        if line.strip()
    ]
    if not prompts:
        raise ValueError(f"{file} holds 0 prompts: write one JSON object a line, as {EXAMPLE}")
    return prompts


def _parse(line: str, index: int, where: str, folder: Path) -> Prompt:
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}): write {EXAMPLE}") from error
    if not isinstance(entry, dict) or "segments" not in entry:
        raise ValueError(f"{where} has no key 'segments': write {EXAMPLE}")
    segments, switches = entry["segments"], entry.get("switch_frames", [])
    if not isinstance(segments, list) or not all(isinstance(text, str) for text in segments):
        raise ValueError(f"{where}: 'segments' is {segments!r}, not a list of texts: {EXAMPLE}")
    if not isinstance(switches, list) or not all(type(frame) is int for frame in switches):
        raise ValueError(
            f"{where}: 'switch_frames' is {switches!r}, not a list of latent frames: {EXAMPLE}"
        )
    video, clip, frames = (entry.get(key) for key in ("video", "clip", "video_frames"))
    if not isinstance(video, str | None) or any(type(n) not in (int, type(None))
                                                for n in (clip, frames)):  # fmt: skip
        raise ValueError(
            f"{where}: 'video' is {video!r}, 'clip' {clip!r} and 'video_frames' {frames!r}: a path "
            f"and whole numbers are needed, as {CONTINUATION}"
        )
    try:
        return Prompt(
            segments=tuple(segments), switch_frames=tuple(switches), index=index,
            video=None if video is None else folder / video, clip=clip, video_frames=frames or 0,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_prompts(prompts: Sequence[Prompt], stream: StreamConfig) -> None:
    """Raise ValueError for a switch inside a block, at frame 0 or past the end of the video.

    Likewise for a given beginning that ends inside a block or leaves nothing to generate.
    """
    for prompt in prompts:
        given, most = prompt.video_frames, stream.num_frames - stream.block_frames
        if given % stream.block_frames or given > most:
            raise ValueError(
                f"prompt {prompt.index} takes {given} latent frames of {prompt.video}: "
                f"'video_frames' must be a multiple of the block of {stream.block_frames}, at most "
                f"{most}, or stream.num_frames must grow"
            )
        for frame in prompt.switch_frames:
            if frame % stream.block_frames:
                below = frame - frame % stream.block_frames
                raise ValueError(
                    f"prompt {prompt.index} switches at latent frame {frame}, inside a block of "
                    f"{stream.block_frames}: use {below} or {below + stream.block_frames}"
                )
            if not 0 < frame < stream.num_frames:
                raise ValueError(
                    f"prompt {prompt.index} switches at latent frame {frame}: it must lie in "
                    f"[{stream.block_frames}, {stream.num_frames - stream.block_frames}], or "
                    "stream.num_frames must grow"
                )


def permutation(size: int, *coordinates: str | int) -> list[int]:
    """A shuffle of range(size) that depends on the coordinates alone, never on call order."""
    return [int(i) for i in torch.randperm(size, generator=generator(*coordinates))]


class PromptStream:
    """Which prompts update u uses: a pure function of (seed, u), the same on every rank.

    Each epoch is a seeded permutation cut into updates; prompts that do not fill an update are
    left out of that epoch, so that no update holds one prompt twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, groups_per_update: int) -> None:
        if not 0 < groups_per_update <= len(prompts):
            raise ValueError(
                f"policy.groups_per_update {groups_per_update} must lie in [1, {len(prompts)}], "
                "the number of prompts: add prompts or lower it"
            )
        self.prompts = tuple(prompts)
        self.seed = seed
        self.groups_per_update = groups_per_update
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def updates_per_epoch(self) -> int:
        """Updates before the prompts are shuffled anew."""
        return len(self.prompts) // self.groups_per_update

    def groups_of(self, update: int) -> list[Prompt]:
        """The prompts of update `update` >= 0, over all data ranks, in order."""
        epoch, place = divmod(update, self.updates_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, permutation(len(self.prompts), "prompts", self.seed, epoch)
        start = place * self.groups_per_update
        return [self.prompts[i] for i in self._order[1][start : start + self.groups_per_update]]


def share(groups: Sequence[T], data_rank: int, data_size: int) -> list[T]:
    """This data rank's contiguous share. ValueError if the groups do not divide."""
    if len(groups) % data_size:
        raise ValueError(
            f"policy.groups_per_update {len(groups)} does not divide over {data_size} data ranks: "
            f"use a multiple of {data_size}"
        )
    if not 0 <= data_rank < data_size:
        raise ValueError(f"data rank {data_rank} lies outside [0, {data_size})")
    each = len(groups) // data_size
    return list(groups[data_rank * each : (data_rank + 1) * each])
