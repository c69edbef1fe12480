"""One block from noise to clean latents, and whole videos of many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_kvpo.config import ModelConfig, StreamConfig
from megatron_kvpo.flow import add_noise, clean_from_velocity, next_state, sampler_sigmas
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.parallel.transfer import indices
from megatron_kvpo.records import Prompt
from megatron_kvpo.rollout.stream import Stream, World
from megatron_kvpo.stopwatch import passing

BlockNoise = Callable[[int], Tensor]
"""Step number -> noise_BFCHW: 0 is the starting state, s what makes the state of step s."""

TextEncoder = Callable[[Sequence[str]], Tensor]
"""Texts -> embeddings text_BXD."""

Beginning = Callable[[Prompt], Tensor | None]
"""A prompt -> clean latents [1, F, C, H, W] of its first `video_frames`, on the device; None if it
continues no video."""


def nothing_given(prompt: Prompt) -> Tensor | None:
    """The beginning of prompts that continue no video. ValueError for one that does."""
    if prompt.video_frames:
        raise ValueError(
            f"prompt {prompt.index} continues {prompt.video}, and nothing encodes it here: pass "
            "its latents"
        )
    return None


def given_block(
    prompt: Prompt, given_1FCHW: Tensor | None, frame: int, config: StreamConfig
) -> Tensor | None:
    """The block at `frame` of what a prompt's video brings; None once it is at its end."""
    if given_1FCHW is None or frame >= prompt.video_frames:
        return None
    return given_1FCHW[:, frame : frame + config.block_frames]


class BlockRecord:
    """What one block went through: T states and velocities, and the finished latents."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.velocities: list[Tensor] = []
        self.clean: Tensor = torch.empty(0)


@torch.no_grad()
def denoise_block(
    stream: Stream, draw: BlockNoise, routed_B: Sequence[Sequence[int]] | None = None
) -> BlockRecord:
    """Generate the next block of every row: z0 = noise; x0 = z - sigma v; z' from x0 and noise.

    The block is not yet in the cache: call stream.commit with its clean latents.
    """
    config, record = stream.world.stream, BlockRecord()
    sigmas = sampler_sigmas(config.steps, config.shift)
    state = draw(0)
    for step, sigma in enumerate(sigmas):
        velocity = stream.velocity(state, sigma, routed_B)
        clean = clean_from_velocity(state, velocity, sigma)
        record.states.append(state)
        record.velocities.append(velocity)
        record.clean = clean
        if step + 1 < len(sigmas):
            fresh = draw(step + 1) if config.sampler == "renoise" else None
            state = next_state(
                config.sampler, state, velocity, clean, sigma, sigmas[step + 1], fresh
            )
    return record


def context_state(
    clean: Tensor, config: StreamConfig, coordinates: tuple[int | str, ...]
) -> Tensor:
    """What the pass that fills the cache is fed: clean latents, or slightly noisy ones."""
    if config.context_noise == 0:
        return clean
    fresh = noise(tuple(clean.shape[1:]), *coordinates, "context", device=clean.device)
    return add_noise(clean, fresh, config.context_noise)


@torch.no_grad()
def extend(
    stream: Stream, draw: BlockNoise, coordinates: tuple[int | str, ...],
    routed_B: Sequence[Sequence[int]] | None = None, *, last: bool = False,
) -> BlockRecord:  # fmt: skip
    """Generate the next block of every row and fill the cache with it, unless it is the `last`.

    `coordinates` name the noise of the pass that fills it, if there is any.
    """
    record = denoise_block(stream, draw, routed_B)
    if not last:
        admit(stream, record.clean, coordinates, routed_B)
    return record


def admit(
    stream: Stream, clean: Tensor, coordinates: tuple[int | str, ...],
    routed_B: Sequence[Sequence[int]] | None = None,
) -> None:  # fmt: skip
    """Fill the cache with a finished block, generated or given. For `coordinates` see `extend`."""
    config = stream.world.stream
    stream.commit(context_state(clean, config, coordinates), routed_B, config.context_noise)


def block_noise(
    model: ModelConfig, stream: StreamConfig, coordinates: tuple[int | str, ...],
    device: torch.device,
) -> BlockNoise:  # fmt: skip
    """Noise of one block of one video, [1, F, C, H, W] for each denoising step."""
    shape = (1, stream.block_frames, *model.frame_shape)
    return lambda step: noise(shape, *coordinates, step, device=device)


def encode_segment(
    model: CausalWan, encode: TextEncoder, prompts: Sequence[Prompt], frame: int
) -> TextKeys:
    """Text keys of what each prompt says at latent frame `frame`, one row a prompt."""
    texts = [prompt.segments[prompt.segment_at(frame)] for prompt in prompts]
    return encode_texts(model, encode, texts)


def encode_texts(model: CausalWan, encode: TextEncoder, texts: Sequence[str]) -> TextKeys:
    """Text keys of some texts, one row each."""
    return model.encode_text(encode(texts).to(model.spec.ranks.device))


def encode_for_rows(
    model: CausalWan, encode: TextEncoder, prompt: Prompt, frame: int, num_rows: int
) -> TextKeys:
    """Text keys of what one prompt says at `frame`, encoded once and shared by all rows."""
    same = torch.zeros(num_rows, dtype=torch.long, device=model.spec.ranks.device)
    return encode_segment(model, encode, [prompt], frame).select(same)


@torch.no_grad()
def generate_videos(
    world: World, encode: TextEncoder, prompts: Sequence[Prompt], noise_keys: Sequence[int],
    seed: int, begin: Beginning = nothing_given,
) -> Tensor:  # fmt: skip
    """Stream one video per (prompt, noise key), all rows as one batch. No exploration.

    Where a prompt continues a video, `begin` brings its first frames.

    Returns:
        latent_BFCHW of all stream.num_frames frames.
    """
    config, model = world.stream, world.model
    text = encode_segment(model, encode, prompts, 0)
    stream = Stream.begin(world, len(prompts), text, resident=config.window_frames)
    given = {prompt: begin(prompt) for prompt in dict.fromkeys(prompts)}
    blocks: list[Tensor] = []
    for frame in range(0, config.num_frames, config.block_frames):
        passing(f"latent frame {frame} of {len(stream.tables)} videos")
        if any(frame in prompt.switch_frames for prompt in prompts):
            _switch(stream, encode, prompts, torch.cat(blocks, dim=1))
        draws = [
            block_noise(model.model_config, config, (seed, prompt.index, key, frame),
                        model.spec.ranks.device)
            for prompt, key in zip(prompts, noise_keys, strict=True)
        ]  # fmt: skip
        own_B = [given_block(prompt, given[prompt], frame, config) for prompt in prompts]
        clean = _next_block(stream, own_B, lambda step, d=draws: torch.cat([f(step) for f in d]))  # type: ignore[misc]
        if not config.is_last(frame):
            admit(stream, clean, (seed, "evaluation", frame))
        blocks.append(clean)
    stream.release()
    return torch.cat(blocks, dim=1)


def _next_block(stream: Stream, given_B: Sequence[Tensor | None], draw: BlockNoise) -> Tensor:
    """What is given, row by row, and generated where nothing is."""
    given = {row: block for row, block in enumerate(given_B) if block is not None}
    if len(given) == len(given_B):
        return torch.cat(list(given.values()))
    clean = denoise_block(stream, draw).clean
    for row, block in given.items():  # denoised in vain: prompts that begin alike go together
        clean[row] = block[0]
    return clean


def _switch(
    stream: Stream, encode: TextEncoder, prompts: Sequence[Prompt], latent_BFCHW: Tensor
) -> None:
    """New texts for the rows whose prompt switches at this frame; the others keep theirs."""
    rows = [i for i, prompt in enumerate(prompts) if stream.frame in prompt.switch_frames]
    model = stream.world.model
    changed = encode_segment(model, encode, [prompts[i] for i in rows], stream.frame)
    whole = stream.text.layers
    index = indices(rows, latent_BFCHW.device)
    merged = tuple(
        (key.index_copy(0, index, new_key), value.index_copy(0, index, new_value))
        for (key, value), (new_key, new_value) in zip(whole, changed.layers, strict=True)
    )
    stream.part(rows, changed).recache(changed, latent_BFCHW[index])
    stream.text = TextKeys(merged)
