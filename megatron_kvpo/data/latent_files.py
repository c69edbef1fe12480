"""Encoded clips on disk: shards of safetensors that appear whole, and one manifest over them.

    settings.json            what every shard was made with
    shard_00000.safetensors  clips 0 .. shard_clips - 1 and their texts; its lines in its metadata
    manifest.jsonl           a header, then a line a clip; written when all shards are there
    rejected.jsonl           {"clip", "file", "reason"} of each clip that is in no shard

A shard is what is lost if its making is cut short, and no more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_kvpo.data.encoding import EncodingSpec, data_fingerprint

MANIFEST, SETTINGS, REJECTED = "manifest.jsonl", "settings.json", "rejected.jsonl"
_METADATA_KEY = "latent_cache"
AGAIN = "run tools.cache_latents once more with the same arguments"


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSettings:
    """What a cache is made with. A rerun goes on with the same settings only."""

    spec: EncodingSpec
    videos: str
    """Hash of the clips that the videos' manifest promises."""

    num_clips: int
    shard_clips: int
    """Clips of a shard, whether they can be decoded or not."""

    @property
    def shards(self) -> list[str]:
        """Every shard's file name, in order."""
        count = -(-self.num_clips // self.shard_clips)
        return [f"shard_{number:05d}.safetensors" for number in range(count)]

    def clips_of(self, number: int) -> range:
        """Indices of the clips of one shard."""
        first = number * self.shard_clips
        return range(first, min(first + self.shard_clips, self.num_clips))

    def check(self, other: CacheSettings, where: Path) -> None:
        """Raise ValueError, naming every difference, if `other`, found there, is another one."""
        wrong = self.spec.differences(other.spec)
        wrong += [f"{name} {getattr(self, name)}, not {getattr(other, name)}"
                  for name in ("videos", "num_clips", "shard_clips")
                  if getattr(self, name) != getattr(other, name)]  # fmt: skip
        if wrong:
            raise ValueError(
                f"{where} was made with other settings (asked for is {'; '.join(wrong)}): name "
                "another folder, or the settings that it was made with"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CacheSettings:
        """Back from them."""
        return cls(**{**values, "spec": EncodingSpec.from_json(values["spec"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of a clip under one text."""

    start: int
    """First latent frame."""

    stop: int
    """One past the last."""

    text: str
    name: str
    """Of its embedding's tensor, [tokens, D] without padding."""

    checksum: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One clip of the manifest."""

    clip: int
    shard: str
    shape: tuple[int, int, int, int]
    """[F, C, H, W] of its latents, tensor `latent.<clip>` of the shard."""

    checksum: str
    segments: tuple[Segment, ...]
    file: str
    start: int
    """First pixel frame of the file."""

    num_bytes: int
    """Of the file."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Line:
        """A line as it was read."""
        segments = tuple(Segment(**part) for part in values["segments"])
        shape = tuple(values["shape"])
        return cls(**{**values, "segments": segments, "shape": shape})


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a finished cache holds."""

    settings: CacheSettings
    shard_bytes: Mapping[str, int]
    lines: tuple[Line, ...]
    """By clip, ascending."""

    def fingerprint(self) -> str:
        """Names the data set: what EncodedVideos of the same videos and settings is called too."""
        return data_fingerprint(self.settings.spec, {
            line.clip: (line.file, line.num_bytes,
                        [(part.start, part.stop, part.text) for part in line.segments])
            for line in self.lines
        })  # fmt: skip


@dataclass(slots=True)
class Shard:
    """A shard in the making."""

    name: str
    lines: list[Line] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, clip: int, latent_FCHW: Tensor, told: Iterable[tuple[int, int, str, str, Tensor]],
        *, file: str, start: int, num_bytes: int,
    ) -> None:  # fmt: skip
        """Take a clip in. `told`: (first frame, one past the last, text, name, tokens_XD)."""
        segments = []
        for first, stop, text, name, tokens_XD in told:
            self.tensors.setdefault(name, tokens_XD.cpu().contiguous())
            segments.append(Segment(start=first, stop=stop, text=text, name=name,
                                    checksum=checksum(self.tensors[name])))  # fmt: skip
        held = latent_FCHW.cpu().contiguous()
        self.tensors[latent_name(clip)] = held
        frames, channels, height, width = held.shape
        self.lines.append(Line(
            clip=clip, shard=self.name, shape=(frames, channels, height, width),
            checksum=checksum(held), segments=tuple(segments), file=file, start=start,
            num_bytes=num_bytes,
        ))  # fmt: skip

    def write(self, folder: Path, settings: CacheSettings) -> None:
        """Put the shard in place in one step."""
        found = {"settings": settings.to_json(), "rejected": self.rejected,
                 "lines": [dataclasses.asdict(line) for line in self.lines]}  # fmt: skip
        partial = folder / f".{self.name}.partial"  # one process makes it: its rest is overwritten
        save_file(self.tensors, partial, metadata={_METADATA_KEY: json.dumps(found)})
        shutil.copymode(folder / SETTINGS, partial)  # safetensors keeps others from reading it
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, folder / self.name)


def latent_name(clip: int) -> str:
    """Name of a clip's tensor in its shard."""
    return f"latent.{clip}"


def checksum(tensor: Tensor) -> str:
    """32 hex digits of a tensor's bytes (SHA-256)."""
    data: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()[:32]


def begin(folder: Path, settings: CacheSettings) -> None:
    """Make the folder, or check that it was begun with these settings. ValueError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    filled = any(folder.glob("shard_*")) or (folder / MANIFEST).exists()  # asked for first:
    if path.is_file():  # another process may begin it at the same time
        settings.check(CacheSettings.from_json(json.loads(path.read_text())), folder)
        return
    if filled:
        raise ValueError(f"{folder} holds files of something else and no {SETTINGS}: name another")
    _write_text(path, json.dumps(settings.to_json(), indent=1) + "\n")


def missing_shards(folder: Path, settings: CacheSettings) -> list[int]:
    """Numbers of the shards that are not there, or are no shards of these settings."""
    return [number for number, name in enumerate(settings.shards)
            if _contents(folder / name, settings) is None]  # fmt: skip


def _contents(path: Path, settings: CacheSettings) -> dict[str, Any] | None:
    """What a shard's metadata say; None if it is not there, cut short, or another's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads((file.metadata() or {})[_METADATA_KEY])
    except (SafetensorError, KeyError, json.JSONDecodeError):
        return None
    same = CacheSettings.from_json(found["settings"]) == settings
    return found if same else None


def merge(folder: Path, settings: CacheSettings) -> Manifest | None:
    """Write the manifest over all shards; None while one is missing. Whoever writes it: the same.

    ValueError if not one clip could be encoded.
    """
    lines: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    for name in settings.shards:
        found = _contents(folder / name, settings)
        if found is None:
            return None
        lines += found["lines"]
        rejected += found["rejected"]
    _write_text(folder / REJECTED, "".join(json.dumps(part) + "\n" for part in rejected))
    if not lines:
        raise ValueError(
            f"not one of {settings.num_clips} clips can be used, the first because "
            f"{rejected[0]['reason']}: see {folder / REJECTED}"
        )
    sizes = {name: (folder / name).stat().st_size for name in settings.shards}
    header = {"settings": settings.to_json(), "shards": sizes}
    lines.sort(key=lambda line: int(line["clip"]))
    _write_text(folder / MANIFEST, "".join(json.dumps(part) + "\n" for part in [header, *lines]))
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache, every shard of which is there in its full length.

    ValueError with the name of what is missing or cut short, and the remedy.
    """
    path = folder / MANIFEST
    if not path.is_file():
        how = "python -m tools.cache_latents RECIPE --videos FOLDER --output FOLDER writes one"
        if (folder / SETTINGS).is_file():
            how = f"it was begun and is not finished: {AGAIN}"
        raise ValueError(f"no latents at {folder}: {how}")
    try:
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        manifest = Manifest(
            settings=CacheSettings.from_json(header["settings"]), shard_bytes=header["shards"],
            lines=tuple(Line.from_json(line) for line in lines),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no manifest of latents ({error}): delete it and {AGAIN}"
        ) from (error)
    for name, size in manifest.shard_bytes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{folder / name} {what}: delete what there is of it, and {AGAIN}")
    return manifest


def _write_text(path: Path, text: str) -> None:
    """Write a file that appears whole; several processes may write the same at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
