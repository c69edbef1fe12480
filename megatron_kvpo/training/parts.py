"""What a recipe names around the generator: prompts, text encoder, codec, judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_kvpo.config import (
    CodecConfig,
    ModelConfig,
    ParallelConfig,
    RoutingConfig,
    RunConfig,
)
from megatron_kvpo.data.embeddings import EmbeddingCache
from megatron_kvpo.data.prompts import check_prompts, load_prompts
from megatron_kvpo.model.codec import ShapesCodec, load_codec
from megatron_kvpo.model.specs import check_layout
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.model.wan_vae import WanVae, load_wan_vae
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import Prompt
from megatron_kvpo.reward.base import SHAPES
from megatron_kvpo.routing import legal_forks
from megatron_kvpo.training.trackers import check_installed
from megatron_kvpo.world import parse_captions

if TYPE_CHECKING:
    from megatron_kvpo.reward.service import RemoteReward


class WithCodec(Protocol):
    """A recipe of training or of pre-training."""

    @property
    def model(self) -> ModelConfig:
        """Sizes of latents."""

    @property
    def codec(self) -> CodecConfig:
        """What makes them."""


def build_encoder(config: RunConfig) -> EmbeddingCache | WordEncoder:
    """`text_encoder` of data.embeddings."""
    return text_encoder(config.model, config.data.embeddings)


def text_encoder(model: ModelConfig, embeddings: Path | None) -> EmbeddingCache | WordEncoder:
    """Embeddings from a file, or the word encoder of the shapes world.

    ValueError for a file that is missing, no cache, or of other sizes than the model's.
    """
    text_dim, text_length = model.text_dim, model.text_length
    if embeddings is not None:
        return EmbeddingCache(embeddings, text_dim=text_dim, text_length=text_length)
    return WordEncoder(text_dim, text_length)


def build_codec(config: RunConfig, ranks: Ranks) -> ShapesCodec | WanVae:
    """Wan's VAE from codec.vae, on the CPU while it is idle, or the shapes codec. Frozen.

    ValueError for files that are missing or foreign, and for latents of other channels.
    """
    return codec_on(config, ranks.device)


def codec_on(config: WithCodec, device: torch.device) -> ShapesCodec | WanVae:
    """`build_codec` for a process that is no rank."""
    if config.codec.vae is None:
        codec = load_codec(config.codec, config.model.latent_channels).to(device)
        return codec.requires_grad_(False).eval()
    vae = load_wan_vae(config.codec.vae, max_rows=config.codec.max_rows)
    if vae.latent_channels != config.model.latent_channels:
        raise ValueError(
            f"{config.codec.vae} has {vae.latent_channels} latent channels, model.latent_channels "
            f"is {config.model.latent_channels}: name the VAE that the generator was trained with"
        )
    return vae


def connect_judges(config: RunConfig, ranks: Ranks) -> list[RemoteReward]:
    """The servers that score this rank's clips; none if training processes score themselves.

    ValueError and RuntimeError as reward.service.connect raises them.
    """
    reward = config.reward
    asks = ranks.tensor.rank == ranks.context.rank == 0  # for those that have the same videos
    if not asks or not (reward.service.urls or reward.service.spawn):
        return []
    from megatron_kvpo.reward.service import connect

    names = (*reward.weights, *reward.held_out)
    return connect(reward.service, names, device=ranks.device, recipe=config)


def check_branches(routing: RoutingConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError for more branch ranks than branches."""
    if routing.num_branches < parallel.branch:
        raise ValueError(
            f"parallel.branch {parallel.branch} exceeds routing.num_branches "
            f"{routing.num_branches}: some ranks would have no branch"
        )


def check_run(config: RunConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of a recipe, after the checks that need no ranks.

    ValueError: prompts that do not fit the stream, texts that the text encoder does not take,
    sentences that the rewards cannot read, no legal fork, sizes that do not divide.
    """
    check_installed(config.log)
    check_layout(config.model, config.parallel, config.stream.block_frames)
    legal_forks(config.stream, config.routing)
    check_branches(config.routing, config.parallel)
    prompts = load_prompts(config.data.prompts)
    check_prompts(prompts, config.stream)
    for given, index in {p.video_frames: p.index for p in reversed(prompts)}.items():
        try:
            legal_forks(config.stream, config.routing, given)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
    held_out: list[Prompt] = []
    if config.evaluation.prompts is not None:
        held_out = load_prompts(config.evaluation.prompts)
        check_prompts(held_out, config.stream)
    everything = (*prompts, *held_out)
    build_encoder(config).require([text for prompt in everything for text in prompt.segments])
    if {*config.reward.weights, *config.reward.held_out} & set(SHAPES):
        for prompt in everything:
            parse_captions(prompt.segments)
    return prompts, held_out
