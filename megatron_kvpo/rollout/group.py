"""One prompt's group: a shared prefix, then routed branches and the anchor as one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_kvpo.parallel.collect import Gathering
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import Prompt, RewardTable, RolloutGroup, RoutingPlan, Trajectory
from megatron_kvpo.rollout.sampler import (
    Beginning,
    BlockNoise,
    BlockRecord,
    TextEncoder,
    admit,
    block_noise,
    encode_for_rows,
    encode_segment,
    extend,
    given_block,
    nothing_given,
)
from megatron_kvpo.rollout.stream import Stream, World
from megatron_kvpo.stopwatch import passing, stage


class Sent(Protocol):
    """A group whose clips are being scored."""

    def collect(self) -> RewardTable:
        """Wait for the scores of its rows."""
        ...


class WholeGroup:
    """One group's sequences of all branch ranks. They travel once, when `start` or a call says."""

    def __init__(self, own: RolloutGroup, axis: Axis, sizes: Sequence[int]) -> None:
        self._own, self._axis, self._sizes = own, axis, sizes
        self._gathering: Gathering | None = None
        self._whole: RolloutGroup | None = None

    def start(self) -> None:
        """Send this rank's sequences, and wait for nothing. Collective."""
        if self._gathering is None:
            own, taken = self._own, self._own.trajectory
            tensors = own.latent_NFCHW, taken.state_NPTFCHW, taken.velocity_NPTFCHW
            self._gathering = Gathering(tensors, self._axis, self._sizes)

    def __call__(self) -> RolloutGroup:
        """All of them, in order. Collective, but for later calls."""
        self.start()
        if self._whole is None:
            assert self._gathering is not None
            latent, state, velocity = self._gathering.wait()
            self._whole = dataclasses.replace(
                self._own, latent_NFCHW=latent, sequences=tuple(range(len(latent))),
                trajectory=Trajectory(state_NPTFCHW=state, velocity_NPTFCHW=velocity),
            )  # fmt: skip
        return self._whole


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """A finished group and the pages of its prefix, which replays read. Release it after use."""

    own: RolloutGroup
    """The sequences that this rank has rolled out."""

    prefix: Stream
    """One row, standing at the fork, as the sampling policy left it."""

    sent: Sent | None = None
    """Its clips, if they are with the judges already."""

    whole: WholeGroup | None = None
    """If other branch ranks have sequences of it."""

    @property
    def group(self) -> RolloutGroup:
        """All sequences. Collective over branch ranks, the first time."""
        return self.own if self.whole is None else self.whole()

    def release(self) -> None:
        """Give the prefix's pages back."""
        self.prefix.release()


@dataclass(frozen=True, slots=True)
class GroupNoise:
    """Noises of one group by coordinates: shared by all sequences, whatever rank has them."""

    world: World
    seed: int
    update: int
    prompt_index: int

    def key(self, frame: int) -> tuple[int | str, ...]:
        """Coordinates of the block at latent frame `frame`."""
        return self.seed, self.update, self.prompt_index, frame

    def shared(self, frame: int, rows: int) -> BlockNoise:
        """The same noise in every row."""
        world = self.world
        draw = block_noise(world.model.model_config, world.stream, self.key(frame), self._device)
        return lambda step: draw(step).expand(rows, -1, -1, -1, -1)

    def mixed(self, frame: int, sequences: Sequence[int]) -> BlockNoise:
        """Exploration `noise`: sqrt(1 - a) shared + sqrt(a) own for branches; the anchor's shared.

        a is routing.noise_strength, so every mixture is again standard normal.
        """
        routing, shared = self.world.routing, self.shared(frame, len(sequences))
        strength = routing.noise_strength

        def draw(step: int) -> Tensor:
            base = shared(step)
            rows = [
                row
                if branch == routing.num_branches
                else (1 - strength) ** 0.5 * row
                + strength**0.5
                * noise(tuple(row.shape), *self.key(frame), step, "branch", branch,
                        device=self._device)
                for row, branch in zip(base, sequences, strict=True)
            ]  # fmt: skip
            return torch.stack(rows)

        return draw

    @property
    def _device(self) -> torch.device:
        return self.world.model.spec.ranks.device


@torch.no_grad()
def roll_out_group(
    world: World, encode: TextEncoder, prompt: Prompt, plan: RoutingPlan,
    noises: GroupNoise, sequences: tuple[int, ...], most: int | None = None,
    begin: Beginning = nothing_given,
) -> SampledGroup:  # fmt: skip
    """Generate one group: the prefix once, then `sequences` (branches and the anchor) together.

    Args:
        world: model (acting with the sampling policy), pages and settings.
        encode: text embeddings.
        prompt: what to show.
        plan: where to fork and what each branch sees.
        noises: of this group.
        sequences: which of 0..G (G is the anchor) this rank generates.
        most: rows of one batch; None is all.
        begin: first frames of a prompt that continues a video; the prefix goes on from there.

    Raises:
        ValueError: the plan forks inside what the video brings.
    """
    config, given = world.stream, begin(prompt)
    if plan.fork_frame < prompt.video_frames:
        raise ValueError(
            f"prompt {prompt.index} is given up to latent frame {prompt.video_frames} and cannot "
            f"fork at {plan.fork_frame}: draw the plan with given={prompt.video_frames}"
        )
    stream = Stream.begin(world, 1, encode_segment(world.model, encode, [prompt], 0))
    blocks: list[Tensor] = []
    with stage("prefix"):
        for frame in range(0, plan.fork_frame, config.block_frames):
            passing(f"prompt {prompt.index}, latent frame {frame}")
            _switch(stream, encode, prompt, blocks)
            block = given_block(prompt, given, frame, config)
            if block is None:
                _extend(stream, blocks, noises, noises.shared(frame, 1), None)
            else:
                admit(stream, block, noises.key(frame))
                blocks.append(block)
        _switch(stream, encode, prompt, blocks)
    with stage("branches"):
        parts = [
            _branch(stream, blocks, encode, prompt, plan, noises, part)
            for part in batches(sequences, most)
        ]
    latents, states, velocities = (
        torch.cat(x) if len(x) > 1 else x[0] for x in zip(*parts, strict=True)
    )
    trajectory = Trajectory(state_NPTFCHW=states, velocity_NPTFCHW=velocities)
    group = RolloutGroup(
        prompt=prompt, plan=plan, latent_NFCHW=latents, trajectory=trajectory, sequences=sequences
    )
    return SampledGroup(group, stream)


def batches(sequences: Sequence[int], most: int | None) -> list[tuple[int, ...]]:
    """The same in order, at most so many together; all in one if None."""
    size = most or max(1, len(sequences))
    return [tuple(sequences[i : i + size]) for i in range(0, len(sequences), size)]


def _branch(
    prefix: Stream, blocks: list[Tensor], encode: TextEncoder, prompt: Prompt, plan: RoutingPlan,
    noises: GroupNoise, sequences: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Continue the prefix as one batch to the end of the video: latents, states, velocities."""
    world, num_rows = prefix.world, len(sequences)
    config = world.stream
    same = torch.zeros(num_rows, dtype=torch.long, device=blocks[0].device)
    stream = prefix.fork(num_rows, prefix.text.select(same))
    blocks = [block.expand(num_rows, -1, -1, -1, -1) for block in blocks]
    window_stop = plan.fork_frame + plan.num_blocks * config.block_frames
    records: list[BlockRecord] = []
    for frame in range(plan.fork_frame, config.num_frames, config.block_frames):
        passing(f"prompt {prompt.index}, sequences {list(sequences)}, latent frame {frame}")
        if frame == window_stop:
            stream.keep_window()
        if frame != plan.fork_frame:
            _switch(stream, encode, prompt, blocks)
        routed, draw = None, noises.shared(frame, num_rows)
        if frame < window_stop:
            routed = [(*plan.routed_frames_G, ())[n] for n in sequences]
            if world.routing.exploration == "noise":
                draw = noises.mixed(frame, sequences)
        record = _extend(stream, blocks, noises, draw, routed)
        if frame < window_stop:
            records.append(record)
    stream.release()
    return (
        torch.cat(blocks, dim=1),
        _stack([record.states for record in records]),
        _stack([record.velocities for record in records]),
    )


def _extend(
    stream: Stream, blocks: list[Tensor], noises: GroupNoise, draw: BlockNoise,
    routed: Sequence[Sequence[int]] | None,
) -> BlockRecord:  # fmt: skip
    """Generate a block, fill the cache with it, append its latents."""
    last = stream.world.stream.is_last(stream.frame)
    record = extend(stream, draw, noises.key(stream.frame), routed, last=last)
    blocks.append(record.clean)
    return record


def _switch(stream: Stream, encode: TextEncoder, prompt: Prompt, blocks: list[Tensor]) -> None:
    """If the prompt switches where the stream stands: new text, re-cache."""
    if stream.frame in prompt.switch_frames:
        rows = len(stream.tables)
        text = encode_for_rows(stream.world.model, encode, prompt, stream.frame, rows)
        stream.recache(text, torch.cat(blocks, dim=1))


def _stack(per_block: list[list[Tensor]]) -> Tensor:
    """P lists of T tensors [N, ...] -> [N, P, T, ...]."""
    return torch.stack([torch.stack(list(steps), dim=1) for steps in per_block], dim=1)
