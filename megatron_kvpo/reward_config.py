"""Settings of the rewards: what is scored, by which models, and where scoring runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_kvpo.method_config import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRewardConfig:
    """VideoAlign's VideoReward: components videoreward_vq, videoreward_mq and videoreward_ta."""

    folder: Path | None = None
    """Its checkpoint as released: model_config.json and checkpoint-<step>/."""

    base: Path | None = None
    """Folder of Qwen2-VL-2B-Instruct, tokenizer and processor included."""

    template: Path | None = None
    """What the model is asked: prompt_template.py of VideoAlign's code, or a text file with
    {text_prompt} where the video's text goes. It is part of what the model was trained on."""

    grayscale_motion: bool = True
    """Motion quality is judged on grayscale frames, in the same forward."""

    max_clips: int = 4
    """Clips of one forward."""

    def __post_init__(self) -> None:
        check_positive("reward.video_reward", max_clips=self.max_clips)


@dataclass(frozen=True, kw_only=True, slots=True)
class HpsV3Config:
    """HPSv3, an image reward: component hpsv3, the mean over a clip's pixel frames."""

    weights: Path | None = None
    """HPSv3.safetensors."""

    base: Path | None = None
    """Folder of Qwen2-VL-7B-Instruct, tokenizer and processor included."""

    template: Path | None = None
    """What the model is asked: data_collator_qwen.py of HPSv3's code, or a text file with
    {text_prompt}. It is part of what the model was trained on."""

    every: int = 12
    """Pixel frames from one that is scored to the next; the first is."""

    max_images: int = 8
    """Pixel frames of one forward."""

    def __post_init__(self) -> None:
        check_positive("reward.hpsv3", every=self.every, max_images=self.max_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig:
    """Scoring by tools/serve_rewards.py instead of in the training process."""

    urls: tuple[str, ...] = ()
    """Servers that run, http://host:port each; together they must have every component. The
    environment's MEGATRON_KVPO_REWARD_TOKEN is sent with every request."""

    spawn: bool = False
    """Start a server beside each rank, in a process of its own, and stop it at the end."""

    frames: Literal["float32", "uint8"] = "float32"
    """How pixel frames travel: as they are, or rounded to a quarter of the bytes."""

    timeout_s: float = 300.0
    """An answer that takes longer counts as none."""

    patience_s: float = 540.0
    """A scorer that does not answer is asked again for so long; meanwhile the run waits. Below
    parallel.timeout_s, after which ranks that wait for other ranks' scores give up."""

    def __post_init__(self) -> None:
        check_positive("reward.service", timeout_s=self.timeout_s, patience_s=self.patience_s)
        if self.spawn and self.urls:
            raise ValueError(
                f"reward.service.spawn starts servers and reward.service.urls names {self.urls}: "
                "choose one"
            )
        wrong = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"reward.service.urls {wrong} must begin with http:// or https://")


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Watches whether what is trained on and what is held out part ways, as a hacked reward does.

    Over the evaluations on the way (evaluation.every).
    """

    patience: int = 2
    """Evaluations in a row at which the trained composite has risen since the start and the
    held-out rewards have fallen, before the alarm sounds."""

    tolerance_sd: float = 0.1
    """A fall counts from so many standard deviations of the base on."""

    stop: bool = False
    """End the run at the alarm, with its checkpoint and report."""

    def __post_init__(self) -> None:
        check_positive("reward.guard", patience=self.patience)
        if self.tolerance_sd < 0:
            raise ValueError(f"reward.guard.tolerance_sd is {self.tolerance_sd}: use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """What is optimised and what is only watched."""

    weights: dict[str, float] = field(default_factory=dict)
    """Component name -> weight in the composite."""

    held_out: tuple[str, ...] = ()
    """Scored at evaluation, never trained on."""

    pixel_fps: int = 16
    global_clip_pixel_frames: int = 36
    """Length of the clip centred on each segment."""

    video_reward: VideoRewardConfig = field(default_factory=VideoRewardConfig)
    hpsv3: HpsV3Config = field(default_factory=HpsV3Config)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        both = sorted(set(self.weights) & set(self.held_out))
        if both:
            raise ValueError(f"rewards {both} are both trained on and held out: choose one")
        check_positive("reward", pixel_fps=self.pixel_fps,
                       global_clip_pixel_frames=self.global_clip_pixel_frames)  # fmt: skip
