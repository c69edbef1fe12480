"""Encode videos and their texts once, so that training reads latents from disk.

    python -m tools.cache_latents RECIPE --videos data/clips --output data/latents --frames 21
    torchrun --nproc_per_node 8 -m tools.cache_latents RECIPE --videos ... --output ...

The recipe, of training or pre-training, gives the model's latent size, the codec and the prompt
embeddings; `section.key=value` changes a setting. The videos' folder holds manifest.jsonl: a line
{"file", "segments", "switch_frames"} or {"file", "caption"} a video. Each process encodes every
n-th shard; the last to end writes the manifest. What is there by then does not depend on how many
they are. A call that was cut short goes on where it stopped, if its settings are the same. Clips
that cannot be used are listed in rejected.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    ClipReader,
    Codec,
    Decoded,
    EncodingSpec,
    TextEncoder,
    VideoClip,
    encode_clip,
    list_clips,
    text_name,
    text_tokens,
)
from megatron_kvpo.data.latent_files import (
    MANIFEST,
    REJECTED,
    CacheSettings,
    Shard,
    begin,
    merge,
    missing_shards,
)
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
    clips = list_clips(options.videos, spec.starts)
    wanted = CacheSettings(spec=spec, videos=_hash_of(clips), num_clips=len(clips),
                           shard_clips=options.shard_clips)  # fmt: skip
    require(encoder, clips)
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
        reader = ClipReader(options.videos, spec, codec.temporal_stride, options.backend)
        work = Encoder(reader, codec, encoder, device, options)
        work.run(wanted, clips, mine, first=rank == 0)
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
    """Makes shards: decodes ahead in threads, encodes one clip after another."""

    def __init__(
        self, reader: ClipReader, codec: Codec, encoder: TextEncoder, device: torch.device,
        options: argparse.Namespace,
    ) -> None:  # fmt: skip
        self._reader, self._codec, self._encoder = reader, codec, encoder
        self._device, self._options = device, options

    def run(
        self, wanted: CacheSettings, clips: Sequence[VideoClip], numbers: Sequence[int], *,
        first: bool,
    ) -> None:  # fmt: skip
        """Make these shards, in order."""
        total = sum(len(wanted.clips_of(number)) for number in numbers)
        started, done = time.monotonic(), 0
        with log.Progress(total, first=first, label="clip") as progress:
            for number in numbers:
                shard = Shard(wanted.shards[number])
                texts: dict[str, Tensor] = {}
                some = [clips[index] for index in wanted.clips_of(number)]
                for clip, decoded in self._decoded(some):
                    self._add(shard, clip, decoded, texts)
                    done += 1
                shard.write(self._options.output, wanted)
                rate = done / (time.monotonic() - started)
                progress.update(done, **{"clips/s": rate, "rejected": len(shard.rejected)})

    def _decoded(self, clips: Iterable[VideoClip]) -> Iterator[tuple[VideoClip, Decoded | str]]:
        """Each clip's pixels, or why there are none; a few are decoded ahead."""

        def enter() -> None:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)

        def read(clip: VideoClip) -> Decoded | str:
            try:
                return self._reader.read(clip)
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(self._options.threads, initializer=enter) as pool:
            waiting: list[tuple[VideoClip, Future[Decoded | str]]] = []
            for clip in clips:
                waiting.append((clip, pool.submit(read, clip)))
                if len(waiting) > self._options.threads:
                    ready, future = waiting.pop(0)
                    yield ready, future.result()
            for ready, future in waiting:
                yield ready, future.result()

    def _add(
        self, shard: Shard, clip: VideoClip, decoded: Decoded | str, texts: dict[str, Tensor]
    ) -> None:
        if isinstance(decoded, str):
            shard.rejected.append({"clip": clip.index, "file": clip.file, "reason": decoded})
            logger.warning("clip %d is left out: %s", clip.index, decoded)
            return
        spec = self._reader.spec
        latent_FCHW = encode_clip(self._codec, decoded.video_CFHW, spec.dtype, self._device)
        told = []
        for first, stop, text in decoded.segments:
            if text not in texts:
                texts[text] = text_tokens(self._encoder, text)
            told.append((first, stop, text, text_name(spec, text), texts[text]))
        shard.add(clip.index, latent_FCHW, told, file=clip.file, start=clip.start,
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
    embeddings = options.embeddings or (whole.get("data") or {}).get("embeddings")
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
        return build_encoder(config)  # type: ignore[return-value]
    return load_umt5(options.text_encoder, text_length=config.model.text_length, device=device)


def spec_of(
    config: RunConfig, options: argparse.Namespace, codec: Codec, encoder: TextEncoder
) -> EncodingSpec:
    """What all clips have in common."""
    model, stride = config.model, codec.spatial_stride
    if encoder.text_dim != model.text_dim:
        raise ValueError(f"the text encoder gives {encoder.text_dim} numbers a token, "
                         f"model.text_dim is {model.text_dim}")  # fmt: skip
    frames = options.frames or [config.stream.num_frames]
    return EncodingSpec.of(
        codec, encoder, size=(model.latent_height * stride, model.latent_width * stride),
        num_frames=tuple(frames), starts=tuple(options.starts), fps=options.fps,
        dtype=options.dtype,
    )  # fmt: skip


def require(encoder: Any, clips: Iterable[VideoClip]) -> None:
    """Raise ValueError for a text that the encoder cannot encode, before the first clip."""
    if not isinstance(encoder, UMT5Encoder):
        encoder.require([told.text for clip in clips for told in clip.told])


def _hash_of(clips: Sequence[VideoClip]) -> str:
    text = json.dumps([dataclasses.asdict(clip) for clip in clips])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.cache_latents",
                                     description=(__doc__ or "").split("\n")[0])  # fmt: skip
    add = parser.add_argument
    add("recipe", type=Path)
    add("overrides", nargs="*", metavar="section.key=value")
    add("--videos", type=Path, required=True, metavar="FOLDER")
    add("--output", type=Path, required=True, metavar="FOLDER")
    add("--frames", type=_numbers, help="latent frames of a clip; default: the stream's. 21,13,9: "
        "a file too short for one gives the next")  # fmt: skip
    add("--starts", type=_numbers, default=[0], help="pixel frames at which clips begin: 0,81")
    add("--fps", type=float, help="pixel frames a second to take; default: as the files have them")
    add("--dtype", choices=list(DTYPES), default="float32", help="of the latents")
    add("--shard-clips", type=int, default=64)
    add("--vae", type=Path, help="Wan's folder; default: codec.vae")
    add("--text-encoder", type=Path, help="Wan's folder, for umT5")
    add("--embeddings", type=Path, help="what tools.encode_prompts wrote; default: data.embeddings")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--backend", choices=["cpu", "gpu"], default="cpu", help="what decodes the videos")
    add("--threads", type=int, default=2, help="files that are decoded at once")
    options = parser.parse_intermixed_args(arguments)
    if min(options.shard_clips, options.threads) < 1:
        parser.error(f"--shard-clips {options.shard_clips} and --threads {options.threads} must be "
                     "at least 1")  # fmt: skip
    return options


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    log.run_command(main, logger)
