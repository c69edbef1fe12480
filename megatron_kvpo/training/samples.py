"""Showing what a generator makes of some prompts while it is being pre-trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from megatron_kvpo.config import RewardConfig, RoutingConfig, StreamConfig
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.codec import ShapesCodec
from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.records import Prompt
from megatron_kvpo.reward.base import SHAPES
from megatron_kvpo.reward.composite import Scorer
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.rollout.stream import new_world

SHOWN_FRAMES = 14
MAGNIFICATION = 3


class Sampler:
    """Streams one video per prompt, always from the same noises, and scores it."""

    def __init__(
        self, model: CausalWan, codec: ShapesCodec, stream: StreamConfig, prompts: Sequence[Prompt]
    ) -> None:
        self._model, self._codec, self._prompts = model, codec, list(prompts)
        sizes = model.model_config
        self._encode = WordEncoder(sizes.text_dim, sizes.text_length).encode
        self._world = new_world(model, stream, RoutingConfig(), len(self._prompts))
        weights = dict.fromkeys(SHAPES, 1.0)
        self._scorer = Scorer(RewardConfig(weights=weights), stream, codec.decode_rows)

    @torch.no_grad()
    def show(self, path: Path) -> dict[str, float]:
        """Write a filmstrip, one row a prompt; return the mean score of each reward."""
        keys = [0] * len(self._prompts)
        latent = generate_videos(self._world, self._encode, self._prompts, keys, seed=0)
        frames = self._codec.decode_pixels(latent[:16]).cpu()
        index = torch.linspace(0, frames.shape[1] - 1, SHOWN_FRAMES).long()
        strips = frames[:, index].permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        image = Image.fromarray((strips * 255).round().to(torch.uint8).numpy().astype(np.uint8))
        size = (image.width * MAGNIFICATION, image.height * MAGNIFICATION)
        image.resize(size, Image.Resampling.NEAREST).save(path)
        scores = self._scorer.score_videos(latent, self._prompts)
        return {name: float(score.mean()) for name, score in scores.items()}


def plot_curve(curve: Path) -> Path:
    """Draw a curve.jsonl of pre-training, the loss and the rewards per step, beside it as PNG."""
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    left.plot(*zip(*losses, strict=True), color="#2f6fdb")
    left.set(xlabel="step", ylabel="velocity error", yscale="log")
    for name in SHAPES:
        scores = [(row["step"], row[name]) for row in rows if name in row]
        if scores:
            right.plot(*zip(*scores, strict=True), marker="o", label=name.replace("_", " "))
    right.set(xlabel="step", ylabel="mean score, dev prompts", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path = curve.with_suffix(".png")
    figure.savefig(path)
    return path
