"""The transformer is Wan's: diffusers' own classes, with the same random weights, say so.

Names are converted by diffusers itself, so that our own mapping table is no witness for itself.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import ModelConfig, ParallelConfig, StreamConfig
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.sight import diffusion_sight
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import base_parameters
from megatron_kvpo.parallel.seeds import noise
from tests.unit import small

LIMIT = 1e-5
"""Relative to the largest output."""

FRAMES, BLOCK = 6, 3
HEAD_DIMS = (16, 20, 32)
"""20 splits its 10 pairs unevenly over time, rows and columns."""

ranks = small.ranks


def sizes(head_dim: int, num_layers: int) -> ModelConfig:
    return ModelConfig(
        hidden_dim=4 * head_dim, ffn_dim=96, num_layers=num_layers, num_heads=4, text_dim=24,
        text_length=10, latent_channels=4, latent_height=6, latent_width=8, sinusoid_dim=32,
        max_frames=32,
    )  # fmt: skip


def build(config: ModelConfig, ranks) -> CausalWan:
    model = CausalWan(config, Spec.build(config, ParallelConfig(), ranks, None))
    small.enliven(model)
    return model.requires_grad_(False)


def theirs(kind: type, model: CausalWan, **more: object) -> torch.nn.Module:
    """diffusers' model of this kind with our weights, all of them and no others."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    config = model.model_config
    other = kind(
        patch_size=config.patch, num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim, in_channels=config.latent_channels,
        out_channels=config.latent_channels, text_dim=config.text_dim,
        freq_dim=config.sinusoid_dim, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
        eps=config.eps, rope_max_seq_len=64, **more,
    )  # fmt: skip
    released = {name: p.detach().clone() for name, p in base_parameters(model)}
    converted = convert_wan_transformer_to_diffusers(released)
    own = other.state_dict()
    assert own.keys() == converted.keys()
    other.load_state_dict({name: t.view(own[name].shape) for name, t in converted.items()})
    return other.eval()


def inputs(config: ModelConfig, rows: int = 2) -> tuple[Tensor, Tensor]:
    latent_BFCHW = noise((rows, FRAMES, *config.frame_shape), "parity", "latent")
    text_BXD = noise((rows, config.text_length, config.text_dim), "parity", "text")
    text_BXD[:, 7:] = 0  # padding, which is attended
    return latent_BFCHW, text_BXD


def error(ours: Tensor, expected_BCFHW: Tensor) -> float:
    expected = expected_BCFHW.transpose(1, 2)
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_layers", [1, 3])
@torch.no_grad()
def test_one_pass_with_full_attention_is_diffusers_wan(ranks, head_dim, num_layers):
    from diffusers import WanTransformer3DModel

    model = build(sizes(head_dim, num_layers), ranks)
    other = theirs(WanTransformer3DModel, model, cross_attn_norm=True,
                   qk_norm="rms_norm_across_heads")  # fmt: skip
    latent, text = inputs(model.model_config)
    time_B = torch.tensor([937.5, 250.0])
    ours = model(latent, time_B[:, None], range(FRAMES), model.encode_text(text))
    expected = other(latent.transpose(1, 2), time_B, text, return_dict=False)[0]
    assert error(ours, expected) < LIMIT
    assert error(ours.flip(0), expected) > 0.1  # rows differ: the limit means something


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@torch.no_grad()
def test_one_block_causal_pass_is_diffusers_skyreels(ranks, head_dim):
    """Each frame with a time of its own; a block sees itself and the blocks before it."""
    from diffusers import SkyReelsV2Transformer3DModel

    model = build(sizes(head_dim, num_layers=3), ranks)
    other = theirs(SkyReelsV2Transformer3DModel, model, num_frame_per_block=BLOCK)
    latent, text = inputs(model.model_config)
    time_BF = torch.tensor([[0.0, 0, 0, 625, 625, 625], [937.5, 937.5, 937.5, 1000, 1000, 1000]])
    stream = StreamConfig(num_frames=FRAMES, block_frames=BLOCK, resident_frames=12)
    sight = diffusion_sight(stream, model.model_config.tokens_per_frame)
    keys = model.encode_text(text)
    ours = model(latent, time_BF, range(FRAMES), keys, sight=sight)
    expected = other(
        latent.transpose(1, 2), time_BF, text, enable_diffusion_forcing=True, return_dict=False
    )[0]
    assert error(ours, expected) < LIMIT
    assert error(model(latent, time_BF, range(FRAMES), keys), expected) > 1e-3  # all see all


@torch.no_grad()
def test_streaming_over_the_whole_history_is_the_block_causal_pass(ranks):
    """The cached path against diffusers: clean blocks in pages, then one noisy block."""
    from diffusers import SkyReelsV2Transformer3DModel

    from megatron_kvpo.config import RoutingConfig
    from megatron_kvpo.rollout.stream import Stream, new_world

    model = build(sizes(head_dim=16, num_layers=3), ranks)
    other = theirs(SkyReelsV2Transformer3DModel, model, num_frame_per_block=BLOCK)
    latent, text = inputs(model.model_config, rows=1)
    stream_config = StreamConfig(num_frames=FRAMES, resident_frames=12)
    world = new_world(model, stream_config, RoutingConfig(), rows=2)
    stream = Stream.begin(world, 1, model.encode_text(text))
    stream.commit(latent[:, :BLOCK])
    ours = stream.velocity(latent[:, BLOCK:], 0.625)
    stream.release()
    time_BF = torch.tensor([[0.0, 0, 0, 625, 625, 625]])
    expected = other(
        latent.transpose(1, 2), time_BF, text, enable_diffusion_forcing=True, return_dict=False
    )[0]
    assert error(ours, expected[:, :, BLOCK:]) < LIMIT
