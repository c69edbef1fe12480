"""The causal Wan 2.1 video transformer, for streaming and for block-causal training.

Parameter names are those of the released weights, so a checkpoint loads without a mapping.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_kvpo import stopwatch
from megatron_kvpo.config import ModelConfig
from megatron_kvpo.model.captured import CapturedPasses, Layers
from megatron_kvpo.model.embeddings import (
    Head,
    TimeProjection,
    TwoLinears,
    patchify,
    sinusoid,
    unpatchify,
)
from megatron_kvpo.model.flops import pass_flops, training_flops
from megatron_kvpo.model.fused import without_graph
from megatron_kvpo.model.layer import CausalBlock
from megatron_kvpo.model.lora import mark_replicated
from megatron_kvpo.model.pages import PagePool, PassPages
from megatron_kvpo.model.recompute import Recompute
from megatron_kvpo.model.rope import Rotary
from megatron_kvpo.model.sight import Sight
from megatron_kvpo.model.specs import Spec, prepare


@dataclass(frozen=True, slots=True)
class TextKeys:
    """Cross-attention keys and values of some texts, per layer."""

    layers: Layers
    """(key_BXAE, value_BXAE) of each layer."""

    def select(self, rows: Tensor) -> TextKeys:
        """The texts of these rows, in this order; a text may serve many rows."""
        return TextKeys(tuple((k[rows], v[rows]) for k, v in self.layers))


_TEXT = re.compile(r"text_embedding\.|blocks\.\d+\.cross_attn\.(k|v|norm_k)\.")


def serves_text(name: str) -> bool:
    """Whether CausalWan.encode_text uses the parameter of this name, and no pass does."""
    return _TEXT.match(name) is not None


class CausalWan(nn.Module):
    """Predicts the velocity noise - clean of latent frames from cached ones and a text."""

    def __init__(self, config: ModelConfig, spec: Spec) -> None:
        super().__init__()
        self.model_config, self.spec, self.config = config, spec, spec.megatron
        dim, device, sequence = config.hidden_dim, spec.ranks.device, spec.sequence
        self.patch_embedding = nn.Conv3d(
            config.latent_channels, dim, config.patch, config.patch, device=device
        )
        self.text_embedding = TwoLinears(
            config.text_dim, dim, nn.GELU("tanh"), device, sequence=False
        )
        self.time_embedding = TwoLinears(
            config.sinusoid_dim, dim, nn.SiLU(), device, sequence=sequence
        )
        self.time_projection = TimeProjection(dim, device, sequence=sequence)
        self.blocks = nn.ModuleList(CausalBlock(config, spec) for _ in range(config.num_layers))
        patch_size = config.patch[1] * config.patch[2]
        self.head = Head(
            dim, patch_size * config.latent_channels, config.eps, device, sequence=sequence,
            dtype=config.torch_dtype,
        )  # fmt: skip
        for parameter in self.patch_embedding.parameters():
            mark_replicated(parameter, sequence=False)
        grid = config.latent_height // config.patch[1], config.latent_width // config.patch[2]
        self._rotary = Rotary(config.head_dim, grid, config.max_frames)
        self._captured = CapturedPasses()
        self.recompute = Recompute((spec.ranks.tensor, spec.ranks.context))
        self.to(device)
        for name, parameter in self.named_parameters():
            if ".adapter." not in name and not spec.masters:  # what trains stays float32
                parameter.data = parameter.data.to(config.torch_dtype)
        prepare(self)

    def new_pool(self, num_pages: int) -> PagePool:
        """A pool of pages for this rank's heads."""
        ranks = self.spec.ranks
        return PagePool(
            num_pages=num_pages, num_layers=self.model_config.num_layers,
            tokens_per_frame=self.model_config.tokens_per_frame,
            num_heads=self.model_config.num_heads // ranks.tensor.size // ranks.context.size,
            head_dim=self.model_config.head_dim, device=ranks.device,
            dtype=self.model_config.torch_dtype,
        )  # fmt: skip

    def encode_text(self, text_BXD: Tensor) -> TextKeys:
        """Keys and values of text embeddings [B, X, text_dim], with gradient if enabled."""
        text_XBD = text_BXD.transpose(0, 1).to(self.model_config.torch_dtype)
        hidden_XBD = self.spec.split_tokens(self.text_embedding(text_XBD))
        return TextKeys(tuple(block.cross_attn.encode(hidden_XBD) for block in self.blocks))  # type: ignore[operator, union-attr]

    def forward(
        self, latent_BFCHW: Tensor, timestep_BF: Tensor, frames: Sequence[int], text: TextKeys,
        pages: PassPages | None = None, sight: Sight | None = None,
    ) -> Tensor:  # fmt: skip
        """Velocity of noisy latent frames.

        Args:
            latent_BFCHW: noisy (or, at timestep 0, clean) latent frames.
            timestep_BF: 1000 sigma of each frame; [B, 1] when all frames of a row share it.
            frames: absolute latent frame numbers of the F frames.
            text: keys and values, one text a row.
            pages: cached frames to attend to, and where to leave this pass's own.
            sight: which tokens of the pass each of them attends to, in a pass without pages; by
                default all.

        Returns:
            velocity_BFCHW, float32, whole on every tensor and context rank; nothing, [0], where
            `pages` only fills.
        """
        if stopwatch.running():
            self._count(latent_BFCHW, pages, sight)
        table = self._rotary.table(frames, latent_BFCHW.device)
        inputs = latent_BFCHW, timestep_BF, table, text.layers
        if pages is not None and self._captures(latent_BFCHW):
            return self._captured.run(self._compute, *inputs, pages, self.spec.switch.slot)
        return self._compute(*inputs, pages, sight)

    def _captures(self, latent_BFCHW: Tensor) -> bool:
        """Whether a pass is worth a CUDA graph, and its weights stay where they are."""
        few = latent_BFCHW.shape[0] <= self.model_config.cuda_graph_rows
        return few and without_graph(latent_BFCHW) and not self.spec.swaps

    def _compute(
        self, latent_BFCHW: Tensor, timestep_BF: Tensor, table_2LE: Tensor, text: Layers,
        pages: PassPages | None, sight: Sight | None = None,
    ) -> Tensor:  # fmt: skip
        """The pass itself: nothing here waits for the GPU or depends on values."""
        num_frames = latent_BFCHW.shape[1]
        share = self._context_share(num_frames)
        hidden_LBD = self._embed(latent_BFCHW)[share]
        sine_FBD = sinusoid(timestep_BF.transpose(0, 1), self.model_config.sinusoid_dim)
        time_FBD = self.time_embedding(sine_FBD.to(self.model_config.torch_dtype))
        steps_FB6D = self.time_projection(time_FBD)
        hidden_LBD = self.spec.split_tokens(hidden_LBD)
        time_LBD, steps_LB6D = (
            self._per_token(x, num_frames, share) for x in (time_FBD, steps_FB6D)
        )
        rotary = table_2LE[:, share].contiguous()
        arguments = [
            (steps_LB6D, keys, rotary, layer, pages, sight) for layer, keys in enumerate(text)
        ]
        if torch.is_grad_enabled():
            mode = self.model_config.recompute
            hidden_LBD = self.recompute.run(mode, list(self.blocks), hidden_LBD, arguments)
        else:
            fills = pages is not None and pages.fills_only
            for block, own in zip(self.blocks[: len(text) - fills], arguments, strict=False):
                hidden_LBD = block(hidden_LBD, *own)
            if fills:
                self.blocks[-1].fill(hidden_LBD, steps_LB6D, rotary, len(text) - 1, pages)  # type: ignore[operator]
                return latent_BFCHW.new_empty(0)
        out_LBC = self.spec.gather_tokens(self.head(hidden_LBD, time_LBD))
        out_LBC = self.spec.gather_context(out_LBC)
        return unpatchify(out_LBC.float(), self.model_config.patch, self.model_config.frame_shape)

    def _count(self, latent_BFCHW: Tensor, pages: PassPages | None, sight: Sight | None) -> None:
        """Tell the stopwatch what this pass costs this rank."""
        rows, frames = latent_BFCHW.shape[:2]
        tokens, ranks = self.model_config.tokens_per_frame, self.spec.ranks
        seen = frames if pages is None else frames - pages.own_from + pages.read_BM.shape[1]
        graph, rank = torch.is_grad_enabled(), 0
        if self.spec.lora and self.spec.switch.slot and (graph or not self.spec.merges):
            rank = self.spec.lora[0]
        keys = seen * tokens if sight is None else sight.num_pairs / sight.num_tokens
        one = pass_flops(self.model_config, frames * tokens, keys, rank, graph=graph)
        if pages is not None and pages.fills_only:  # but for two small products
            one -= one // self.model_config.num_layers
        needed = one
        if graph:
            pairs = round(frames * tokens * keys)
            needed = training_flops(self.model_config, frames * tokens, pairs, rank)
        share = rows / (ranks.tensor.size * ranks.context.size)
        stopwatch.count(share * one, rows, needed_flops=share * needed,
                        tokens=share * frames * tokens)  # fmt: skip

    def _embed(self, latent_BFCHW: Tensor) -> Tensor:
        layer, dtype = self.patch_embedding, self.model_config.torch_dtype
        assert layer.bias is not None
        patches_LBC = patchify(latent_BFCHW.to(dtype), self.model_config.patch)
        weight, bias = layer.weight.flatten(1).to(dtype), layer.bias.to(dtype)
        return nn.functional.linear(patches_LBC, weight, bias)

    def _context_share(self, num_frames: int) -> slice:
        """This context rank's contiguous share of the pass's tokens."""
        axis = self.spec.ranks.context
        count = num_frames * self.model_config.tokens_per_frame // axis.size
        return slice(axis.rank * count, (axis.rank + 1) * count)

    def _per_token(self, x_FB: Tensor, num_frames: int, share: slice) -> Tensor:
        """Per-frame values for this rank's tokens; one value for all stays one.

        Under a graph one for each run of tokens that lies in one frame, and all runs are as long:
        values of whole frames, where ranks share no frame. Parameters behind them see this rank's
        tokens only and are marked so.
        """
        if x_FB.shape[0] == 1:
            return x_FB
        if x_FB.shape[0] != num_frames:
            raise ValueError(f"{x_FB.shape[0]} timesteps for {num_frames} latent frames")
        axis, tokens = self.spec.ranks.tensor, self.model_config.tokens_per_frame
        count, first = share.stop - share.start, share.start
        if self.spec.sequence:
            count //= axis.size
            first += axis.rank * count
        run = math.gcd(count, tokens) if torch.is_grad_enabled() else 1
        if run == tokens and count == num_frames * tokens:
            return x_FB
        starts = torch.arange(first, first + count, run, device=x_FB.device)
        return x_FB[starts // tokens]
