"""Batches of encoded videos without an end, from a cache on disk.

They are the same for the same data, seed and global batch, on any number of data ranks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_kvpo.data.clips import Schedule, rank_share
from megatron_kvpo.data.encoding import EncodingSpec
from megatron_kvpo.data.latent_files import AGAIN, Line, checksum, latent_name, read_manifest
from megatron_kvpo.data.video import read_ahead
from megatron_kvpo.model.umt5 import padded
from megatron_kvpo.records import LatentBatch

OPEN_SHARDS = 64
"""Shards that are mapped at once."""


def check_shared(batch_size: int, rank: int, world_size: int) -> None:
    """Raise ValueError for a global batch of none, or one that data ranks cannot share."""
    if batch_size < 1 or not 0 <= rank < world_size or batch_size % world_size:
        raise ValueError(
            f"a global batch of {batch_size} cannot be shared by {world_size} data ranks (this "
            f"is rank {rank}): use a multiple of {world_size}"
        )


class ClipOrder:
    """Which clips a data rank takes: clips.Schedule over buckets of one shape each."""

    def __init__(
        self, buckets: Mapping[Any, Sequence[int]], *, batch_size: int, seed: int, rank: int = 0,
        world_size: int = 1,
    ) -> None:  # fmt: skip
        """`batch_size` is that of all ranks. ValueError for none, or one that they cannot share."""
        check_shared(batch_size, rank, world_size)
        self.seed = seed
        named = [(i, clip) for i, key in enumerate(sorted(buckets)) for clip in buckets[key]]
        self._clips = [clip for _, clip in named]
        self._schedule = Schedule([bucket for bucket, _ in named], batch_size, seed, shuffle=True)
        self._rank, self._world_size = rank, world_size

    def clips_of(self, step: int) -> list[int]:
        """This rank's contiguous share of a global step's clips."""
        rows = rank_share(self._schedule.step(step), self._rank, self._world_size)
        return [self._clips[place] for place, _ in rows]


class LatentCache:
    """Clips that tools.cache_latents has encoded. Shards are mapped, not read whole.

    What is read for the first time is compared with its checksum.
    """

    def __init__(
        self, folder: str | Path, *, batch_size: int = 1, seed: int = 0, rank: int = 0,
        world_size: int = 1, device: torch.device | str = "cpu", ahead: int = 2,
    ) -> None:  # fmt: skip
        """Open a finished cache.

        Args:
            folder: what tools.cache_latents wrote.
            batch_size: clips of a step, over all data ranks.
            seed: of the order.
            rank: data rank.
            world_size: data ranks.
            device: where batches go.
            ahead: batches that a thread reads in advance.

        Raises:
            ValueError: no cache, one that is not finished, a shard that is missing or cut short,
                a batch that does not divide over the ranks.
        """
        self.folder, self.manifest = Path(folder), read_manifest(Path(folder))
        self.spec: EncodingSpec = self.manifest.settings.spec
        self._lines = {line.clip: line for line in self.manifest.lines}
        buckets: dict[tuple[int, ...], list[int]] = {}
        for line in self.manifest.lines:
            buckets.setdefault(line.shape, []).append(line.clip)
        self.order = ClipOrder(buckets, batch_size=batch_size, seed=seed, rank=rank,
                               world_size=world_size)  # fmt: skip
        self._device, self._ahead = placed(device), ahead
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self._checked: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Clips."""
        return len(self._lines)

    def __contains__(self, clip: object) -> bool:
        return clip in self._lines

    def fingerprint(self) -> str:
        """See LatentStream.fingerprint."""
        return self.manifest.fingerprint()

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """See LatentStream.batches. ValueError with its name for a shard that is damaged."""
        read = read_ahead(self._batch, step, self._ahead, self._device)
        return (moved(batch, self._device) for batch in read)

    def latent(self, clip: int) -> Tensor:
        """latent_FCHW of one clip, float32 on the CPU. ValueError for a clip that is not there."""
        return self._tensor(self.line(clip), latent_name(clip), self.line(clip).checksum).float()

    def line(self, clip: int) -> Line:
        """What the manifest says of a clip. ValueError for one that is not there."""
        if clip not in self._lines:
            known = self._lines.keys()
            raise ValueError(
                f"{self.folder} has no clip {clip}: it holds {len(known)} of {min(known)} to "
                f"{max(known)}; rejected.jsonl says why others are not there"
            )
        return self._lines[clip]

    def _batch(self, step: int) -> LatentBatch:
        clips = self.order.clips_of(step)
        lines = [self.line(clip) for clip in clips]
        texts = [self._tensor(line, part.name, part.checksum)
                 for line in lines for part in line.segments]  # fmt: skip
        return joined(
            clips, [self.latent(clip) for clip in clips],
            [[(part.start, part.stop) for part in line.segments] for line in lines],
            padded(texts, self.spec.text_length, self.spec.text_dim),
        )  # fmt: skip

    def _tensor(self, line: Line, name: str, wanted: str) -> Tensor:
        path = self.folder / line.shard
        try:
            with self._lock:
                found: Tensor = self._shard(line.shard).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and {AGAIN}") from error
        if (line.shard, name) not in self._checked:
            if checksum(found) != wanted:
                raise ValueError(
                    f"{path} is damaged: {name} of clip {line.clip} does not have its checksum. "
                    f"Delete it, and {AGAIN}"
                )
            self._checked.add((line.shard, name))
        return found

    def _shard(self, name: str) -> Any:
        """A handle on the mapped file; safetensors gives it no types."""
        if name not in self._shards:
            self._shards[name] = safe_open(self.folder / name, "pt")
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(name)
        return self._shards[name]


def joined(
    clips: Sequence[int], latents: Sequence[Tensor], told: Sequence[Sequence[tuple[int, int]]],
    text_SXD: Tensor,
) -> LatentBatch:  # fmt: skip
    """A batch of clips of one shape. `told`: (first frame, one past the last) of their segments."""
    segments = [(row, *part) for row, parts in enumerate(told) for part in parts]
    return LatentBatch(
        latent_BFCHW=torch.stack(list(latents)), segment_S3=torch.tensor(segments),
        text_SXD=text_SXD, index_B=torch.tensor(list(clips)),
    )  # fmt: skip


def placed(device: torch.device | str) -> torch.device:
    """The device; of several GPUs the current one, where none is named."""
    found = torch.device(device)
    if found == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return found


def moved(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """The batch on a device, but for the clips' numbers."""
    return LatentBatch(
        latent_BFCHW=batch.latent_BFCHW.to(device), segment_S3=batch.segment_S3.to(device),
        text_SXD=batch.text_SXD.to(device), index_B=batch.index_B,
    )  # fmt: skip
