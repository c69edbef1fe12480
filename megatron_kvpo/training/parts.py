"""The frozen parts around the generator that a recipe names: text encoder, codec, judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from megatron_kvpo.config import CodecConfig, ModelConfig, RunConfig
from megatron_kvpo.data.embeddings import EmbeddingCache
from megatron_kvpo.model.codec import ShapesCodec, load_codec
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.model.wan_vae import WanVae, load_wan_vae
from megatron_kvpo.parallel.groups import Ranks

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
