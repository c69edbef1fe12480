"""Settings of the generator and of the method: sizes, streaming, routing, energy, objective.

The defaults are the method's (arXiv 2605.14278, LongLive 1.3B recipe); where the reference code
differs, the docstring says which value repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from megatron_kvpo.settings import WithPresets


def check_positive(section: str, **values: float) -> None:
    """Raise ValueError for a setting that must be above 0 and is not."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{section}.{name} is {value}: it must be above 0")


BACKBONES: Mapping[str, Mapping[str, int]] = MappingProxyType({
    "wan2.1_1.3b": {"hidden_dim": 1536, "ffn_dim": 8960, "num_layers": 30, "num_heads": 12},
    "wan2.1_14b": {"hidden_dim": 5120, "ffn_dim": 13824, "num_layers": 40, "num_heads": 40},
})  # fmt: skip
"""Sizes of the released transformers; what they do not name is the same in both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(WithPresets):
    """The causal Wan transformer."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = BACKBONES
    preset: str | None = None
    """`wan2.1_1.3b` or `wan2.1_14b`: sizes to start from. Keys given beside it win."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base's weights, activations and pages. What trains is float32 whatever it is, and so
    are norms, rotation angles and the time embedding's sines."""

    fp8: tuple[Literal["ffn", "attention", "text"], ...] = ()
    """Families of linear layers that multiply in 8 bits (e4m3), on a frozen base: the feed-forward,
    self-attention's, those to the text. Their adapters and all else stay as `dtype` says."""

    fp8_scaling: Literal["row", "block"] = "row"
    """A scale for each token and output feature (torch), or for 128 features of a token and 128 x
    128 of a weight (Transformer Engine). Neither lets a row of a batch depend on another."""

    hidden_dim: int = 1536
    ffn_dim: int = 8960
    num_layers: int = 30
    num_heads: int = 12
    latent_channels: int = 16
    latent_height: int = 60
    latent_width: int = 104
    patch: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""

    text_dim: int = 4096
    text_length: int = 512
    """Text tokens; shorter prompts are padded with zeros, which are attended."""

    sinusoid_dim: int = 256
    eps: float = 1e-6
    max_frames: int = 1024
    """Latent frames the rotary table reaches."""

    weights: Path | None = None
    """Any form that tools/convert_checkpoint.py reads; None initialises at random."""

    recompute: bool | Literal["auto"] = False
    """Recompute the blocks' activations in backward: all, none, or (auto) those that do not fit in
    the GPU's memory."""

    cuda_graph_rows: int = 2
    """Passes without gradient of at most so many rows are captured as CUDA graphs. 0: none."""

    def __post_init__(self) -> None:
        check_positive(
            "model", hidden_dim=self.hidden_dim, ffn_dim=self.ffn_dim, text_dim=self.text_dim,
            num_layers=self.num_layers, num_heads=self.num_heads, text_length=self.text_length,
            latent_channels=self.latent_channels,
        )  # fmt: skip
        if self.hidden_dim % self.num_heads or (self.hidden_dim // self.num_heads) % 2:
            raise ValueError(
                f"model.hidden_dim {self.hidden_dim} over model.num_heads {self.num_heads} must be "
                "an even whole number, the head size"
            )
        if self.cuda_graph_rows < 0:
            raise ValueError(f"model.cuda_graph_rows is {self.cuda_graph_rows}: use 0 or more")
        if self.patch[0] != 1:
            raise ValueError(f"model.patch is {self.patch}: a token spans 1 latent frame")
        if self.latent_height % self.patch[1] or self.latent_width % self.patch[2]:
            raise ValueError(
                f"a latent frame of {self.latent_height} x {self.latent_width} does not divide "
                f"into patches of {self.patch[1]} x {self.patch[2]}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return (self.latent_height // self.patch[1]) * (self.latent_width // self.patch[2])

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_dim // self.num_heads

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of one latent frame."""
        return self.latent_channels, self.latent_height, self.latent_width

    def pixel_size(self, spatial_stride: int) -> tuple[int, int]:
        """Height and width of the pixel frames that a codec of this stride makes of latent ones."""
        return self.latent_height * spatial_stride, self.latent_width * spatial_stride


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """Latents to pixels and back: Wan's VAE, or the codec of the shapes world."""

    vae: Path | None = None
    """Folder of Wan's VAE; None is the codec of the shapes world, which has the same interface."""

    max_rows: int | None = None
    """Videos that Wan's VAE decodes at once; None is all. At 480 x 832 one is enough."""

    weights: Path | None = None
    """safetensors of the shapes codec, as the rest is; None initialises at random."""

    width: int = 64
    """Channels of its convolutions at latent resolution."""

    spatial_stride: int = 4
    temporal_stride: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig:
    """How a video is generated, block after block."""

    num_frames: int = 147
    block_frames: int = 3
    sink_frames: int = 3
    window_frames: int = 12
    """Frames a block sees in all: sink, past and its own."""

    resident_frames: int = 33
    """Frames kept in the cache, so that routing has a pool to draw from."""

    steps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    """Denoising steps before the shift, falling."""

    shift: float = 5.0
    """sigma = shift * s / (1 + (shift - 1) * s)."""

    sampler: Literal["renoise", "euler"] = "renoise"
    """`renoise` re-noises the clean estimate with fresh noise; `euler` is the plain ODE step."""

    context_noise: float = 0.0
    """Noise level of the pass that fills the cache. The reference trains with 0.005."""

    first_chunk_frames: int = 21
    chunk_frames: int = 18

    def __post_init__(self) -> None:
        check_positive("stream", block_frames=self.block_frames, num_frames=self.num_frames,
                  shift=self.shift)  # fmt: skip
        for name, value in (
            ("num_frames", self.num_frames), ("first_chunk_frames", self.first_chunk_frames),
            ("chunk_frames", self.chunk_frames), ("sink_frames", self.sink_frames),
            ("window_frames", self.window_frames), ("resident_frames", self.resident_frames),
        ):  # fmt: skip
            if value % self.block_frames or value < 0:
                raise ValueError(
                    f"stream.{name} is {value}: it must be a multiple of stream.block_frames "
                    f"{self.block_frames}"
                )
        if self.window_frames < self.sink_frames + 2 * self.block_frames:
            raise ValueError(
                f"stream.window_frames {self.window_frames} must hold the sink "
                f"({self.sink_frames}), the block and one block before it ({self.block_frames} "
                "each)"
            )
        if self.resident_frames < self.window_frames:
            raise ValueError(
                f"stream.resident_frames {self.resident_frames} is below stream.window_frames "
                f"{self.window_frames}"
            )
        if not self.steps or any(not 0 < s <= 1 for s in self.steps):
            raise ValueError(f"stream.steps {list(self.steps)} must lie in (0, 1]")
        if any(b >= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"stream.steps {list(self.steps)} must fall")

    @property
    def num_blocks(self) -> int:
        """Blocks of a whole video."""
        return self.num_frames // self.block_frames

    def is_last(self, frame: int) -> bool:
        """Whether the block that begins at latent frame `frame` ends the video."""
        return frame + self.block_frames == self.num_frames

    def chunk_of(self, frame: int) -> tuple[int, int]:
        """[start, stop) of the chunk that latent frame `frame` lies in."""
        if frame < self.first_chunk_frames:
            return 0, min(self.first_chunk_frames, self.num_frames)
        index = (frame - self.first_chunk_frames) // self.chunk_frames
        start = self.first_chunk_frames + index * self.chunk_frames
        return start, min(start + self.chunk_frames, self.num_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """MemFlow's memory: a bank of old frames chosen by the text, and sparse attention to it."""

    bank_frames: int = 0
    """Frames in the bank, seen besides sink and recent ones. 0 (LongLive): no bank; MemFlow: 3."""

    stage_blocks: int = 3
    """The first frame of every such block is staged for the bank, from block 0 on."""

    sparse: bool = False
    """Each head attends to its `sparse_frames` best sink and bank frames only (SMA)."""

    sparse_frames: int = 3

    reference_quirks: bool = True
    """Commit a staged frame at each of the three blocks after its staging, and in a re-cache, and
    rank with a zero text query around a switch, as the released weights were trained. False:
    commit once, at the next block, with the prompt's own keys."""

    def __post_init__(self) -> None:
        check_positive("memory", stage_blocks=self.stage_blocks, sparse_frames=self.sparse_frames)
        if self.bank_frames < 0:
            raise ValueError(f"memory.bank_frames is {self.bank_frames}: it must not be negative")
        if self.sparse and not self.bank_frames:
            raise ValueError("memory.sparse chooses among bank frames: set memory.bank_frames too")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    """How the branches of a group come to differ."""

    exploration: Literal["chr", "noise", "none"] = "chr"
    """Causal History Routing; branches with noise of their own; or no exploration at all."""

    num_branches: int = 8
    """Branches per prompt, the group size G. The unrouted anchor is not counted."""

    num_routed_blocks: int = 5
    """Consecutive blocks of the policy window, P."""

    num_recent_frames: int = 1
    """Past frames next to the block that every branch keeps."""

    pool_margin_frames: int = 0
    """Newest frames before those that routing may not draw either. The reference leaves out 3."""

    fork_chunks: int = 7
    """Forks lie in the first chunks of the video."""

    forks: Literal["per_prompt", "per_update"] = "per_prompt"
    """Each prompt's group draws its own fork; or an update draws one place for all of them, so that
    no data rank waits for one that forked earlier. Uniform over the updates either way."""

    noise_strength: float = 0.3
    """`noise`: share of variance that a branch's own noise replaces, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.num_branches < 2:
            raise ValueError(
                f"routing.num_branches is {self.num_branches}: a group needs at least 2 branches, "
                "or every advantage is zero"
            )
        check_positive(
            "routing", num_routed_blocks=self.num_routed_blocks, fork_chunks=self.fork_chunks
        )
        if self.num_recent_frames < 0 or self.pool_margin_frames < 0:
            raise ValueError(
                f"routing.num_recent_frames {self.num_recent_frames} and "
                f"routing.pool_margin_frames {self.pool_margin_frames} must not be negative"
            )
        if not 0 < self.noise_strength <= 1:
            raise ValueError(f"routing.noise_strength is {self.noise_strength}: use (0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyConfig:
    """Trajectory velocity energy and the surrogate policy."""

    space: Literal["velocity", "x0"] = "velocity"
    """Compare velocities, or clean estimates (the reference: sigma^2 times the former)."""

    grad_steps: int = 2
    """First denoising steps that carry gradient; the rest count in the value only."""

    step_weight: float = 0.5
    """w_s, the weight of each step."""

    temperature: float = 1.0
    """Of the softmax over -energy."""

    replay_context: Literal["recorded", "self"] = "recorded"
    """What a replay commits after a block: the branch's own latents, or (the reference) the
    replaying model's prediction plus context noise."""

    def __post_init__(self) -> None:
        check_positive("energy", grad_steps=self.grad_steps, temperature=self.temperature,
                  step_weight=self.step_weight)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """From rewards to advantages."""

    local_weight: float = 1.0
    global_weight: float = 0.5
    std_floor: float = 0.02
    """Smallest standard deviation a reward difference is divided by, in the reward's units."""

    limit: float = 2.5
    """Advantages are clamped to +- this."""

    baseline: Literal["group", "anchor"] = "group"
    """`group` also subtracts the group's mean; `anchor` (the reference) does not."""

    negative_weight: float = 1.0
    """Factor on advantages below 0. Pushing away from bad branches has no bound; below 1 the pull
    towards good ones weighs more."""

    fusion: Literal["single", "std"] = "single"
    """Normalise once with the floor, or twice without it (the reference)."""

    control: Literal["none", "shuffled", "negated"] = "none"
    """Experiment control: give branches each other's advantages, or the negative of their own."""

    def __post_init__(self) -> None:
        check_positive("advantage", std_floor=self.std_floor, limit=self.limit)
        if self.negative_weight < 0:
            raise ValueError(f"advantage.negative_weight is {self.negative_weight}: use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The policy objective."""

    clip_low: float = 0.1
    clip_high: float = 0.2
    kl_coefficient: float = 10.0
    """Weight of KL(policy || reference) over a group. 0 drops the reference."""

    drift_coefficient: float = 0.0
    """Weight of the squared distance between the policy's velocities and the reference's, in the
    states that the branches visited. The KL compares branches with each other and cannot see a
    drift that they share; this can. 0 (the paper) leaves it out."""

    unsafe_scale: float = 1.0
    """Factor on the loss of a group none of whose branches beats the anchor. The reference: 0.5."""
