"""Encode videos and their texts once, so that training reads latents from disk.

    python -m tools.cache_latents RECIPE --videos data/clips --output data/latents --frames 21
    torchrun --nproc_per_node 8 -m tools.cache_latents RECIPE --videos ... --output ...

The recipe, of training or pre-training, gives the model's latent size, the codec and the prompt
embeddings; `section.key=value` changes a setting. Videos and their texts stand in a folder, a JSONL
or CSV manifest or tar shards (docs/data.md). Each process encodes every n-th shard; the last to end
writes the manifest. What is there by then does not depend on how many they are. A call that was cut
short goes on where it stopped, if its settings are the same. Clips that cannot be used are listed
in rejected.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_kvpo import log, settings
from megatron_kvpo.config import RunConfig
from megatron_kvpo.data.embeddings import DTYPES
from megatron_kvpo.data.encoding import (
    Codec,
    EncodingSpec,
    TextEncoder,
    encode_clip,
    text_name,
    text_tokens,
)
from megatron_kvpo.data.latent_clips import ClipSet, Decoded, VideoClip
from megatron_kvpo.data.latent_files import (
    MANIFEST,
    REJECTED,
    CacheSettings,
    Shard,
    begin,
    merge,
    missing_shards,
)
from megatron_kvpo.data.sources import VideoSource
from megatron_kvpo.data.video import read_ahead
from megatron_kvpo.model.umt5 import UMT5Encoder, load_umt5
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.training.parts import build_encoder, codec_on

logger = log.get_logger("megatron_kvpo.tools.cache_latents")

SHARED_SECTIONS = ("model", "codec", "stream")
"""Sections that recipes of training and of pre-training have in common."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Encode this process's share. ValueError for input that cannot work, before it begins."""
    options = _parse(arguments)
    rank, world = (int(os.environ.get(name, default)) for name, default in
                   (("RANK", "0"), ("WORLD_SIZE", "1")))  # fmt: skip
    log.setup(rank == 0)
    device = choose_device(options.device)
    config = read_recipe(options)
    codec, encoder = codec_on(config, device), find_encoder(config, options, device)
    spec = spec_of(config, options, codec, encoder)
    source = VideoSource(path=options.videos, max_bad=options.max_bad, check=options.check,
                         cache=options.probes)  # fmt: skip
    found = ClipSet(source, spec, codec.temporal_stride, backend=options.backend,
                    num_threads=options.threads)  # fmt: skip
    encoder.require(found.texts)
    clips = found.clips
    wanted = CacheSettings(spec=spec, videos=found.origin(), num_clips=len(clips),
                           shard_clips=options.shard_clips)  # fmt: skip
    begin(options.output, wanted)
    missing = missing_shards(options.output, wanted)
    mine = [number for number in missing if number % world == rank]
    if rank == 0:
        logger.info("%d clips in %d shards, %d of these are there", len(clips), len(wanted.shards),
                    len(wanted.shards) - len(missing))  # fmt: skip
    with ExitStack() as stack:
        for part in (codec, encoder):
            if isinstance(part, WanVae):
                stack.enter_context(part.resident(device))
            elif isinstance(part, UMT5Encoder):
                stack.enter_context(part.resident())
        work = Encoder(found, codec, encoder, device, options)
        work.run(wanted, mine, first=rank == 0)
    manifest = merge(options.output, wanted)
    if manifest is None:
        logger.info("the other processes have shards to make: the last one writes the manifest")
        return 0
    rejected = len(clips) - len(manifest.lines)
    log.setup(True)
    logger.info("%s: %d clips, %d rejected%s, %.1f MB, fingerprint %s", options.output / MANIFEST,
                len(manifest.lines), rejected,
                f" (see {options.output / REJECTED})" if rejected else "",
                sum(manifest.shard_bytes.values()) / 1e6, manifest.fingerprint())  # fmt: skip
    return 0


class Encoder:
    """Makes shards: decodes ahead on a thread, encodes one clip after another."""

    def __init__(
        self, clips: ClipSet, codec: Codec, encoder: TextEncoder, device: torch.device,
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        self._set, self._codec, self._encoder = clips, codec, encoder
        self._device, self._options = device, options

    def run(self, wanted: CacheSettings, numbers: Sequence[int], *, first: bool) -> None:
        """Make these shards, in order."""
        all_clips = self._set.clips
        shards = [[all_clips[index] for index in wanted.clips_of(number)] for number in numbers]
        total = sum(map(len, shards))
        started, done = time.monotonic(), 0
        decoded = self._decoded([clip for clips in shards for clip in clips])
        with log.Progress(total, first=first, label="clip") as progress:
            for number, clips in zip(numbers, shards, strict=True):
                shard = Shard(wanted.shards[number])
                texts: dict[str, Tensor] = {}
                for clip in clips:
                    self._add(shard, clip, next(decoded), texts)
                    done += 1
                shard.write(self._options.output, wanted)
                rate = done / (time.monotonic() - started)
                progress.update(done, **{"clips/s": rate, "rejected": len(shard.rejected)})

    def _decoded(self, clips: Sequence[VideoClip]) -> Iterator[Decoded | str]:
        """Each clip's pixels, or why there are none; some are decoded ahead."""
        at_once = self._options.threads
        read = read_ahead(
            lambda n: self._set.decode(clips[n * at_once : (n + 1) * at_once]), 0, 2, self._device
        )
        for found in itertools.islice(read, -(-len(clips) // at_once)):
            yield from found

    def _add(
        self, shard: Shard, clip: VideoClip, decoded: Decoded | str, texts: dict[str, Tensor]
    ) -> None:
        if isinstance(decoded, str):
            shard.rejected.append({"clip": clip.index, "file": clip.name, "reason": decoded})
            logger.warning("clip %d, %s, is left out: %s", clip.index, clip.name, decoded)
            return
        spec = self._set.spec
        latent_FCHW = encode_clip(self._codec, decoded.video_CFHW, spec.dtype, self._device)
        told = []
        for first, stop, text in decoded.segments:
            if text not in texts:
                texts[text] = text_tokens(self._encoder, text)
            told.append((first, stop, text, text_name(spec, text), texts[text]))
        shard.add(clip.index, latent_FCHW, told, file=clip.name, start=clip.start,
                  num_bytes=decoded.num_bytes)  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The CPU, or the GPU of this process's number on its machine, made current."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ValueError(f"process {number} has no GPU of its own: {torch.cuda.device_count()} "
                         "are visible; start at most that many, or use --device cpu")  # fmt: skip
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def read_recipe(options: argparse.Namespace) -> RunConfig:
    """What a recipe of either kind says of model, codec, stream and embeddings."""
    if not options.recipe.is_file():
        raise ValueError(f"no recipe at {options.recipe}")
    whole: dict[str, Any] = yaml.safe_load(options.recipe.read_text(encoding="utf-8")) or {}
    values = {key: whole[key] for key in SHARED_SECTIONS if key in whole}
    for override in options.overrides:
        settings.merge_override(values, override)
    embeddings = options.embeddings
    for section in ("data", "latents"):
        embeddings = embeddings or (whole.get(section) or {}).get("embeddings")
    if embeddings is not None:
        values["data"] = {"embeddings": str(embeddings)}
    if options.vae is not None:
        values["codec"] = {**values.get("codec", {}), "vae": str(options.vae)}
    return settings.from_mapping(RunConfig, values)


def find_encoder(
    config: RunConfig, options: argparse.Namespace, device: torch.device
) -> TextEncoder:  # fmt: skip
    """umT5 if its folder is named, cached embeddings, or the word encoder."""
    if options.text_encoder is None:
        return build_encoder(config)
    return load_umt5(options.text_encoder, text_length=config.model.text_length, device=device)


def spec_of(
    config: RunConfig, options: argparse.Namespace, codec: Codec, encoder: TextEncoder
) -> EncodingSpec:
    """What all clips have in common."""
    model, stride = config.model, codec.spatial_stride
    if encoder.text_dim != model.text_dim:
        raise ValueError(f"the text encoder gives {encoder.text_dim} numbers a token, "
                         f"model.text_dim is {model.text_dim}")  # fmt: skip
    own = model.pixel_size(stride)
    sizes = options.buckets or (tuple(options.size or own),)
    for size in sizes:
        unit = (stride * model.patch[1], stride * model.patch[2])
        if any(side < 1 or side % whole for side, whole in zip(size, unit, strict=True)):
            raise ValueError(
                f"pixel frames of {size[0]} x {size[1]} do not divide into patches of {unit[0]} x "
                f"{unit[1]}: choose multiples of these"
            )
    return EncodingSpec.of(
        codec, encoder, sizes=sizes, num_frames=tuple(options.frames or [config.stream.num_frames]),
        starts=tuple(options.starts), every=options.every, fps=options.fps, dtype=options.dtype,
    )  # fmt: skip


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.cache_latents",
                                     description=(__doc__ or "").split("\n")[0])  # fmt: skip
    add = parser.add_argument
    add("recipe", type=Path)
    add("overrides", nargs="*", metavar="section.key=value")
    add("--videos", type=Path, required=True, metavar="SOURCE", help="a folder, a JSONL or CSV "
        "manifest, or tar shards: docs/data.md")  # fmt: skip
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--frames", type=_numbers, help="latent frames of a clip; default: the stream's. 21,13,9: "
        "a file too short for one gives the next")  # fmt: skip
    add("--starts", type=_numbers, default=[0], help="pixel frames at which clips begin: 0,81")
    add("--every", type=int, help="clips every so many pixel frames, as far as a file goes")
    add("--fps", type=float, help="pixel frames a second to take; default: as the files have them")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
                       help="of pixel frames; default: the model's")  # fmt: skip
    shape.add_argument("--buckets", type=_sizes, help="sizes, of which a file takes the nearest in "
                       "proportions: 480x832,832x480")  # fmt: skip
    add("--dtype", choices=list(DTYPES), default="float32", help="of the latents")
    add("--shard-clips", type=int, default=64)
    add("--vae", type=Path, help="Wan's folder; default: codec.vae")
    add("--text-encoder", type=Path, help="Wan's folder, for umT5")
    add("--embeddings", type=Path, help="what tools.encode_prompts wrote; default: data.embeddings "
        "or latents.embeddings")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--backend", choices=["cpu", "gpu"], default="cpu", help="what decodes the videos: "
        "gpu is NVDEC")  # fmt: skip
    add("--max-bad", type=float, default=0.1, help="share of files that may be unusable")
    add("--check", choices=["decode", "packets"], default="decode", help="how files are probed")
    add("--probes", type=Path, metavar="FOLDER", help="of what probing found, and of the report of "
        "files that are skipped; default: beside the videos")  # fmt: skip
    add("--threads", type=int, default=2, help="files that are decoded at once")
    options = parser.parse_intermixed_args(arguments)
    if min(options.shard_clips, options.threads) < 1:
        parser.error(f"--shard-clips {options.shard_clips} and --threads {options.threads} must be "
                     "at least 1")  # fmt: skip
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = [part.split("x") for part in text.split(",") if part]
    if not found or any(len(sides) != 2 for sides in found):
        raise ValueError(text)
    return tuple((int(height), int(width)) for height, width in found)


if __name__ == "__main__":
    log.run_command(main, logger)
