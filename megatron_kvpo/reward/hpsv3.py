"""HPSv3: how people would like an image for a text, over the pixel frames of a clip.

Qwen2-VL-7B reads an image and a question with one marked token; a rank head gives (mu, sigma).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_kvpo.config import RewardConfig
from megatron_kvpo.records import Clip
from megatron_kvpo.reward.qwen2vl import (
    TEXT_FIELD,
    Question,
    Reader,
    read_template,
    read_weights,
    required,
)

MARKERS = ("<|Reward|>",)
TEMPLATE_CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
"""Of hpsv3/dataset/data_collator_qwen.py, one after the other."""

PIXELS = 256 * 28 * 28
"""Of an image, at least and at most: the rule for too large images ends just below."""


def rank_head(hidden: int) -> nn.Sequential:
    """Hidden state to (mu, sigma); HPSv3's default head."""
    return nn.Sequential(
        nn.Linear(hidden, 1024), nn.ReLU(), nn.Dropout(0.05),
        nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip


class HpsV3:
    """The mean of mu over every n-th pixel frame of a clip, each against the text of its span."""

    components = ("hpsv3",)

    def __init__(self, reader: Reader, template: str, config: RewardConfig) -> None:
        """Wrap a loaded reader; `build` makes all of it."""
        self._judge, self._template = reader, template
        self._every, self._max_images = config.hpsv3.every, config.hpsv3.max_images

    @classmethod
    def build(cls, config: RewardConfig, device: torch.device) -> HpsV3:
        """From local files. ValueError with the setting or file that does not do."""
        settings = config.hpsv3
        weights = required(settings.weights, "hpsv3.weights", "the file HPSv3.safetensors")
        base = required(settings.base, "hpsv3.base", "the folder of Qwen2-VL-7B-Instruct")
        template = read_template(
            required(
                settings.template, "hpsv3.template", "HPSv3's data_collator_qwen.py, or a text "
                "file with the question",
            ),
            TEMPLATE_CONSTANTS, MARKERS,
        )  # fmt: skip
        reader = Reader(base, MARKERS, device)
        head = rank_head(reader.config.text_config.hidden_size)
        reader.load(read_weights(weights), head, weights)
        return cls(reader, template, config)

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        if not clips:
            return torch.empty(len(self.components), 0)
        images = [self._images(clip) for clip in clips]
        rows = [question for questions in images for question in questions]
        mu_N = self._judge.ask_all(rows, "image", self._max_images)[:, 0, 0]
        scores_B = torch.stack(
            [mu_n.mean() for mu_n in torch.split(mu_N, [len(q) for q in images])]
        )
        return scores_B[None].to(clips[0].frames_FCHW.device)

    def _images(self, clip: Clip) -> list[Question]:
        texts = [span.text for span in clip.spans for _ in range(span.start, span.stop)]
        return [
            Question(
                frames_FCHW=self._judge.fit(
                    clip.frames_FCHW[place : place + 1], min_pixels=PIXELS, max_pixels=PIXELS
                ),
                text=self._template.replace(TEXT_FIELD, texts[place]),
            )
            for place in range(0, len(texts), self._every)
        ]
