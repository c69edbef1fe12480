"""Stream a video from text to an mp4 file, block after block, with prompt switches.

    python -m tools.generate examples/shapes/demo.yaml --output out.mp4 --scale 8 \
        --prompt "a red square at the top left moves right" --prompt "it turns blue" --switch 9
    python -m tools.generate RECIPE --prompts prompts.jsonl --line 3 --output out.mp4
    python -m tools.generate RECIPE --interactive --output out.mp4
    python -m tools.generate RECIPE --video in.mp4 --video-frames 12 --prompt "..." --output out.mp4
    python -m tools.generate RECIPE --prompt "..." --output latents.safetensors --record out.json

The recipe gives the model, how it streams, and its files; `section.key=value` changes a setting.
With --video its first latent frames begin the video, and the generator goes on from there.
With --decode-on cuda:1 a second GPU decodes a block while the first makes the next.
With --interactive each line typed becomes the prompt of the next block while the video goes on.
Ctrl-C ends the video; what there is of it is kept. An output that ends in .safetensors holds the
latents (latent_FCHW) and nothing is decoded; --record writes seconds a block and peak memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import queue
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.checkpoint.adapters import load_adapter
from megatron_kvpo.checkpoint.convert import load_base
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.data.prompts import load_prompts
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import AdapterBank
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.umt5 import load_umt5
from megatron_kvpo.model.wan_vae import WanVae
from megatron_kvpo.model.weights import initialise
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.live import LiveDecoder, LiveVideo
from megatron_kvpo.rollout.sampler import TextEncoder
from megatron_kvpo.rollout.stream import World, new_world
from megatron_kvpo.training.continuation import Beginnings
from megatron_kvpo.training.parts import build_codec, build_encoder
from tools.generate_output import Clock, decoding_device, find_output, record

logger = log.get_logger("megatron_kvpo.tools.generate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """What to show, and from which latent frame on."""

    texts: tuple[str, ...]
    switch_frames: tuple[int, ...]
    continued: Prompt | None = None
    """Names the video that is continued."""

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.switch_frames) + 1:
            raise ValueError(
                f"{len(self.texts)} prompts need {len(self.texts) - 1} switch frames, "
                f"{len(self.switch_frames)} are given: --switch 39,75,111"
            )

    def check(self, block_frames: int, num_frames: int) -> None:
        """Raise ValueError for switches out of order, off a block's start, or past the end."""
        given = self.continued.video_frames if self.continued else 0
        if given % block_frames or given >= num_frames:
            raise ValueError(
                f"--video-frames {given} must be a multiple of {block_frames}, the block, and less "
                f"than the {num_frames} latent frames of the video"
            )
        frames = self.switch_frames
        wrong = [f for f in frames if f % block_frames or not 0 < f < num_frames]
        if wrong or list(frames) != sorted(set(frames)):
            raise ValueError(
                f"switch frames {list(frames)} must rise, be multiples of {block_frames} and lie "
                f"between 0 and {num_frames} latent frames"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate one video. ValueError for input that cannot work, before anything is generated."""
    options = _parse(arguments)
    config = named_parts(load_config(options.recipe, options.overrides), options)
    num_frames = options.frames or config.stream.num_frames
    if num_frames < 1 or num_frames % config.stream.block_frames:
        raise ValueError(
            f"--frames {num_frames} must be a multiple of {config.stream.block_frames}, the block"
        )
    script = read_script(options)
    script.check(config.stream.block_frames, num_frames)
    ranks = start_ranks(config.parallel, config.device)
    try:
        log.setup(is_first(ranks))
        model = build_model(config, ranks, options.weights, options.adapter)
        encode = remembered(find_encoder(config, options))
        encode(script.texts)  # an unknown word or a missing embedding shows before the first block
        latents_only = options.output.suffix == ".safetensors"
        decoder = None if latents_only else Decoder(config, ranks, options.decode_on)
        given = find_beginning(config, ranks, script, decoder)
        # Nothing is routed, so the cache keeps the window and no more.
        stream = dataclasses.replace(config.stream, num_frames=num_frames,
                                     resident_frames=config.stream.window_frames)  # fmt: skip
        world = new_world(model, stream, config.routing, 1, config.memory)
        acting = AdapterBank(model, model.spec.switch).use("current") if options.adapter else None
        clock = Clock(ranks.device)
        with torch.no_grad(), acting or nullcontext(), decoder or nullcontext():
            lines = Lines(sys.stdin) if options.interactive else None
            run(world, encode, script, num_frames, decoder, clock, options, lines, given)
        if options.record is not None:
            record(config, ranks, num_frames, clock, options)
    finally:
        stop_ranks()
    return 0


def run(
    world: World, encode: TextEncoder, script: Script, num_frames: int, decoder: Decoder | None,
    clock: Clock, options: argparse.Namespace, lines: Lines | None = None,
    given_1FCHW: Tensor | None = None,
) -> None:  # fmt: skip
    """The video's loop: switch if it is time, a block, its pixels, the file."""
    coordinates = (options.seed, options.prompt_index, options.noise)
    video = LiveVideo(world, encode, script.texts[0], coordinates)
    switches = dict(zip(script.switch_frames, script.texts[1:], strict=True))
    first, size = is_first(world.model.spec.ranks), world.stream.block_frames
    given = [] if given_1FCHW is None else list(given_1FCHW.split(size, dim=1))
    output = find_output(options) if first else nullcontext()
    with output, log.Progress(num_frames, first=first, label="latent frame") as progress:
        while video.frame < num_frames:
            text = (lines.newest() if lines else None) or switches.get(video.frame)
            if text is not None:
                with clock.measure("switch"):
                    _switch(video, text)
            with clock.measure("block"):
                frames = video.show(given.pop(0)) if given else video.next_block()
            shown: Tensor | None = frames
            if decoder is not None:
                with clock.measure("decode"):
                    shown = decoder.live.next_pixels(frames)
            if not isinstance(output, nullcontext):
                if shown is not None:
                    output.write(shown)
                progress.update(video.frame, fps=output.num_frames / clock.elapsed)
        rest = None if decoder is None else decoder.live.last_pixels()
        if rest is not None and not isinstance(output, nullcontext):
            output.write(rest)
    video.close()
    if not isinstance(output, nullcontext):
        kind = "latent" if decoder is None else "pixel"
        logger.info("%s: %d %s frames in %s, %.1f a second", output.path, output.num_frames, kind,
                    log.format_duration(clock.elapsed),
                    output.num_frames / clock.elapsed)  # fmt: skip


def _switch(video: LiveVideo, text: str) -> None:
    try:
        video.switch(text)
    except ValueError as error:  # a line somebody typed: say so and let the video go on
        logger.warning("not switched: %s", error)
    else:
        logger.info("latent frame %d: %s", video.frame, text)


def find_beginning(
    config: RunConfig, ranks: Ranks, script: Script, decoder: Decoder | None
) -> Tensor | None:
    """Latents [1, F, C, H, W] of the video that is continued. ValueError if they cannot be had."""
    if script.continued is None:
        return None
    codec = decoder.codec if decoder else build_codec(config, ranks)
    beginnings = Beginnings(config.model, codec, ranks.device, config.data.video_fps)
    beginnings.check([script.continued])
    return beginnings.shared((ranks.tensor, ranks.context))(script.continued)


def read_script(options: argparse.Namespace) -> Script:
    """Prompts, switches and video of the command line or of a line of a prompt file."""
    if options.prompts is not None:
        if options.prompt or options.switch or options.video:
            raise ValueError("--prompts brings its own texts and switches: leave out the others")
        prompts = load_prompts(options.prompts)
        if not 0 <= options.line < len(prompts):
            raise ValueError(
                f"--line {options.line}: {options.prompts} has lines 0 to {len(prompts) - 1}"
            )
        options.prompt_index = prompts[options.line].index
        prompt = prompts[options.line]
        return Script(texts=prompt.segments, switch_frames=prompt.switch_frames,
                      continued=prompt if prompt.video else None)  # fmt: skip
    texts = list(options.prompt)
    if options.interactive and not texts:
        texts = [Lines.ask(sys.stdin)]
    if not texts:
        raise ValueError("nothing to show: give --prompt TEXT or --prompts FILE")
    continued = None
    if options.video or options.video_frames or options.clip is not None:
        switches = tuple(options.switch)
        continued = Prompt(segments=tuple(texts), switch_frames=switches, video=options.video,
                           clip=options.clip, video_frames=options.video_frames)  # fmt: skip
    return Script(texts=tuple(texts), switch_frames=tuple(options.switch), continued=continued)


def build_model(
    config: RunConfig, ranks: Ranks, weights: Path | None, adapter: Path | None
) -> CausalWan:
    """The generator with its weights, and an adapter in every slot if one is named."""
    spec = Spec.build(config.model, config.parallel, ranks, config.policy if adapter else None)
    model = CausalWan(config.model, spec).requires_grad_(False).eval()
    source = weights or config.model.weights
    if source is None:
        logger.warning("no weights are named: the video will be noise (--weights, model.weights)")
        initialise(model, config.seed)
    else:
        load_base(model, source)
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def named_parts(config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The recipe with the VAE and the embeddings of the command line, if they are named there."""
    codec = dataclasses.replace(config.codec, vae=options.vae or config.codec.vae)
    embeddings = options.embeddings or config.data.embeddings
    data = dataclasses.replace(config.data, embeddings=embeddings)
    return dataclasses.replace(config, codec=codec, data=data)


def find_encoder(config: RunConfig, options: argparse.Namespace) -> TextEncoder:
    """Cached embeddings, umT5 from its folder, or the word encoder of the shapes world."""
    if options.text_encoder is None:
        return build_encoder(config).encode
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length = config.model.text_length
    return load_umt5(options.text_encoder, text_length=length, device=device).encode


def remembered(encode: TextEncoder) -> TextEncoder:
    """The same encoder, which sees each text once and by itself."""
    one = functools.cache(lambda text: encode([text]))
    return lambda texts: torch.cat([one(text) for text in texts])


class Decoder(AbstractContextManager["Decoder"]):
    """The recipe's codec on its device: Wan's VAE, or the shapes codec."""

    def __init__(self, config: RunConfig, ranks: Ranks, place: str | None = None) -> None:
        """`place`: a device for the VAE alone. ValueError if there is none, or nothing to place."""
        self.codec = build_codec(config, ranks)
        device = ranks.device if place is None else decoding_device(place, ranks)
        self._resident: AbstractContextManager[None] = nullcontext()
        if isinstance(self.codec, WanVae):
            self._resident = self.codec.resident(device)
        elif place is not None:
            self.codec.to(device)
        self.live = LiveDecoder(self.codec, device, beside=place is not None)

    def __enter__(self) -> Decoder:
        self._resident.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._resident.__exit__(*error)


class Lines:
    """What somebody types while a video is generated."""

    def __init__(self, source: TextIO) -> None:
        self._typed: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(source,), daemon=True).start()
        logger.info("type a prompt and press Enter; Ctrl-C ends the video")

    def _read(self, source: TextIO) -> None:
        for line in source:
            if line.strip():
                self._typed.put(line.strip())

    def newest(self) -> str | None:
        """The last line since the last call, or None."""
        text = None
        while not self._typed.empty():
            text = self._typed.get()
        return text

    @staticmethod
    def ask(source: TextIO) -> str:
        """The first prompt, waited for."""
        log.setup(True)
        logger.info("what shall the video show?")
        return source.readline().strip()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help=".mp4; .safetensors: latents")
    parser.add_argument("--record", type=Path, help="JSON: seconds a block, peak memory")
    parser.add_argument("--compare", type=Path, help="another video's latents, for --record")
    parser.add_argument("--prompt", action="append", default=[], help="once for each segment")
    parser.add_argument("--prompts", type=Path, help="a prompt file (JSONL)")
    parser.add_argument("--line", type=int, default=0, help="which of its lines, from 0")
    parser.add_argument("--switch", type=_numbers, default=[], help="latent frames: 39,75,111")
    parser.add_argument("--video", type=Path, help="what to continue: a file, a cache of latents")
    parser.add_argument("--video-frames", type=int, default=0, help="latent frames taken from it")
    parser.add_argument("--clip", type=int, help="which clip of a cache of latents")
    parser.add_argument("--interactive", action="store_true", help="prompts from the terminal")
    parser.add_argument("--frames", type=int, help="latent frames; default: stream.num_frames")
    parser.add_argument("--weights", type=Path, help="any form that convert_checkpoint reads")
    parser.add_argument("--adapter", type=Path, help="PEFT folder, lora.pt or a run's checkpoint")
    parser.add_argument("--decode-on", metavar="DEVICE", help="the VAE beside it, on cuda:1 say")
    parser.add_argument("--vae", type=Path, help="Wan's folder; default: codec.vae")
    parser.add_argument("--text-encoder", type=Path, help="Wan's folder, for umT5")
    parser.add_argument("--embeddings", type=Path, help="default: data.embeddings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=int, default=0, help="another video of the same prompt")
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--scale", type=int, default=1, help="enlarge pixels this many times")
    parser.set_defaults(prompt_index=0)
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    try:
        log.run_command(main, logger)
    except KeyboardInterrupt:
        sys.exit(130)
