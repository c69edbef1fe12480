"""VideoAlign's VideoReward: visual quality, motion quality and text alignment in one forward.

Qwen2-VL-2B reads a clip and a question with three marked tokens; a linear head scores each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo.config import RewardConfig
from megatron_kvpo.records import Clip
from megatron_kvpo.reward.qwen2vl import (
    TEXT_FIELD,
    Question,
    Reader,
    base_weights,
    read_json,
    read_template,
    read_weights,
    required,
)

ASPECTS = ("VQ", "MQ", "TA")
MARKERS = tuple(f"<|{aspect}_reward|>" for aspect in ASPECTS)
TEMPLATE_CONSTANTS = ("DETAILED_PROMPT_WITH_SPECIAL_TOKEN",)
"""Of prompt_template.py, for prompt_template_type `detailed_special`."""

MIN_PIXELS = 128 * 28 * 28
"""Of a pixel frame, as in VideoAlign's vision_process.py and Qwen's."""

FRAME_FACTOR, MIN_FRAMES = 2, 4
LUMA = (0.299, 0.587, 0.114)

CONFIG_FILE, STEP_FOLDER = "model_config.json", "checkpoint-"
WHOLE_FILES = ("model.safetensors", "model.pth")
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BESIDE_FILES = ("non_lora_state_dict.safetensors", "non_lora_state_dict.pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """How adapters are scaled: alpha / rank, or alpha / sqrt(rank)."""

    rank: int
    alpha: float
    rank_stabilized: bool

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What model_config.json says of a checkpoint."""

    max_pixels: int
    fps: float
    num_frames: int | None
    output_dim: int
    lora: Lora | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a released file. ValueError with it for what is missing, mistaken or not known here.

        `reward_token` is not looked at: VideoAlign overrides it where special tokens are used.
        """
        sections = read_json(path)
        data, model = (_section(sections, n, path) for n in ("data_config", "model_config"))
        norms = _section(sections, "inference_config", path, optional=True)
        lora = _section(sections, "peft_lora_config", path, optional=True)
        known = {"prompt_template_type": "detailed_special", "sample_type": "uniform"}
        wrong = {name: data.get(name) for name, v in known.items() if data.get(name, v) != v}
        if model.get("use_special_tokens") is not True:
            wrong["use_special_tokens"] = model.get("use_special_tokens")
        output_dim = int(_number(model, "output_dim", path))
        if output_dim not in (1, len(ASPECTS)):
            wrong["output_dim"] = output_dim
        if wrong:
            raise ValueError(
                f"{path} has {wrong}: {known}, use_special_tokens and an output_dim of 1 or 3 are "
                "what is known here"
            )
        frames = data.get("num_frames")
        recipe = cls(
            max_pixels=int(_number(data, "max_frame_pixels", path)),
            fps=_number(data, "fps", path) if frames is None else 0.0,
            num_frames=None if frames is None else int(_number(data, "num_frames", path)),
            output_dim=output_dim,
            lora=_lora(lora, path) if lora.get("lora_enable") else None,
            mean=tuple(_number(norms, f"{a}_mean", path) if norms else 0.0 for a in ASPECTS),
            std=tuple(_number(norms, f"{a}_std", path) if norms else 1.0 for a in ASPECTS),
        )
        if min(recipe.max_pixels, *recipe.std) <= 0:
            raise ValueError(f"{path} has a max_frame_pixels or a *_std that is not above 0")
        return recipe

    def frame_positions(self, num_frames: int, pixel_fps: float) -> list[int]:
        """Pixel frames that are looked at, evenly from the first to the last, an even number.

        VideoAlign's rule: to the nearest even number, at least 4. ValueError for shorter clips.
        """
        if num_frames < MIN_FRAMES:
            raise ValueError(
                f"a clip of {num_frames} pixel frames: VideoReward needs at least {MIN_FRAMES}"
            )
        count: float = self.num_frames or max(num_frames / pixel_fps * self.fps, MIN_FRAMES)
        even = round(count / FRAME_FACTOR) * FRAME_FACTOR
        even = max(FRAME_FACTOR, min(even, num_frames // FRAME_FACTOR * FRAME_FACTOR))
        places: list[int] = torch.linspace(0, num_frames - 1, even).round().long().tolist()
        return places


def _section(
    sections: dict[str, Any], name: str, path: Path, *, optional: bool = False
) -> dict[str, Any]:
    found = sections.get(name)
    if found is None and optional:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} has no section {name}: give VideoReward's {CONFIG_FILE}")
    return found


def _number(section: dict[str, Any], name: str, path: Path) -> float:
    found = section.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{path} has {name} {found!r}: a number is needed")
    return found


def _lora(section: dict[str, Any], path: Path, prefix: str = "lora_") -> Lora:
    odd = [n for n in ("use_dora", "rank_pattern", "alpha_pattern") if section.get(n)]
    if odd:
        raise ValueError(f"{path} uses {odd}: plain LoRA of one rank is what is known here")
    rank = int(_number(section, f"{prefix}r", path))
    if rank < 1:
        raise ValueError(f"{path} has rank {rank}: it must be at least 1")
    return Lora(
        rank=rank,
        alpha=_number(section, "lora_alpha", path),
        rank_stabilized=section.get("use_rslora") is True,
    )


def newest_checkpoint(folder: Path) -> Path:
    """The `checkpoint-<step>/` of the highest step. ValueError if there is none."""
    steps = {
        int(path.name.removeprefix(STEP_FOLDER)): path
        for path in folder.glob(f"{STEP_FOLDER}*")
        if path.is_dir() and path.name.removeprefix(STEP_FOLDER).isdigit()
    }
    if not steps:
        raise ValueError(f"{folder} has no {STEP_FOLDER}<step>/: give VideoReward's folder")
    return steps[max(steps)]


def checkpoint_state(
    checkpoint: Path, base: Path, recipe: Recipe, reader: Reader
) -> dict[str, Tensor]:
    """Every tensor by its local name, adapters merged. ValueError for what does not go together.

    A whole model, or adapters and what trained beside them, over the base.
    """
    whole = [checkpoint / name for name in WHOLE_FILES if (checkpoint / name).is_file()]
    if whole:
        return merge_lora(read_weights(whole[0]), recipe.lora, whole[0], reader)
    adapter = checkpoint / ADAPTER_FILE
    beside = [checkpoint / name for name in BESIDE_FILES if (checkpoint / name).is_file()]
    if not adapter.is_file() or not beside:
        raise ValueError(
            f"{checkpoint} holds no VideoReward: {' or '.join(WHOLE_FILES)} is needed, or "
            f"{ADAPTER_FILE} and {' or '.join(BESIDE_FILES)}"
        )
    lora = recipe.lora
    if (config := checkpoint / ADAPTER_CONFIG).is_file():
        said = _lora(read_json(config), config, prefix="")
        if lora is not None and said != lora:
            raise ValueError(f"{config} says {said}, {CONFIG_FILE} {lora}: they must agree")
        lora = said
    own = read_weights(adapter, beside[0])
    return merge_lora(base_weights(base) | own, lora, adapter, reader)


def merge_lora(
    state: dict[str, Tensor], lora: Lora | None, source: Path, reader: Reader
) -> dict[str, Tensor]:
    """W + scale B A for every pair, in float32; the others as they are.

    ValueError with the tensor for half a pair, another rank, or a module that is not there.
    """
    halves = {name for name in state if ".lora_" in name}
    if halves and lora is None:
        raise ValueError(f"{source} has adapters, but lora_enable is off: their scale is unknown")
    merged = {name: tensor for name, tensor in state.items() if name not in halves}
    for module in sorted({name.split(".lora_")[0] for name in halves}):
        names = [f"{module}.{part}.weight" for part in ("lora_A", "lora_B")]
        target = f"{module}.weight"
        missing = [name for name in (target, *names) if name not in state]
        if missing:
            raise ValueError(f"{source} adapts {module}, but {missing} is not there")
        merged[target] = _merged(module, [state[n] for n in (target, *names)], lora, source, reader)
        halves -= set(names)
    if halves:
        raise ValueError(f"{source} has adapters that are not LoRA's: {sorted(halves)[:3]}")
    return merged


def _merged(
    module: str, tensors: Iterable[Tensor], lora: Lora | None, source: Path, reader: Reader
) -> Tensor:
    weight, lower, upper = (tensor.to(reader.device, torch.float32) for tensor in tensors)
    rank = lora.rank if lora is not None else 0
    found = (list(lower.shape), list(upper.shape))
    needed = ([rank, weight.shape[-1]], [len(weight), rank])
    if lora is None or found != needed:
        raise ValueError(f"{source}: {module} has adapters of {found} instead of {needed}")
    return torch.addmm(weight, upper, lower, alpha=lora.scale).to(reader.dtype)


def joined_texts(texts: Sequence[str]) -> str:
    """One text as it is; several as sentences, in order."""
    if len(texts) == 1:
        return texts[0]
    return ". ".join([*(text.strip().rstrip(".") for text in texts[:-1]), texts[-1].strip()])


class VideoReward:
    """VQ, MQ and TA of clips, in standard deviations of the checkpoint's own scores."""

    components = ("videoreward_vq", "videoreward_mq", "videoreward_ta")

    def __init__(self, reader: Reader, recipe: Recipe, template: str, config: RewardConfig) -> None:
        """Wrap a loaded reader; `build` makes all of it."""
        self._judge, self._recipe, self._template = reader, recipe, template
        self._pixel_fps = config.pixel_fps
        self._grayscale = config.video_reward.grayscale_motion
        self._max_clips = config.video_reward.max_clips

    @classmethod
    def build(cls, config: RewardConfig, device: torch.device) -> VideoReward:
        """From local files. ValueError with the setting or file that does not do."""
        settings = config.video_reward
        folder = required(
            settings.folder, "video_reward.folder", "VideoReward's, with model_config.json and "
            "checkpoint-<step>/",
        )  # fmt: skip
        base = required(settings.base, "video_reward.base", "the folder of Qwen2-VL-2B-Instruct")
        template = read_template(
            required(
                settings.template, "video_reward.template", "VideoAlign's prompt_template.py, or a "
                "text file with the question",
            ),
            TEMPLATE_CONSTANTS, MARKERS,
        )  # fmt: skip
        recipe = Recipe.read(folder / CONFIG_FILE)
        checkpoint = newest_checkpoint(folder)
        reader = Reader(base, MARKERS, device)
        head = nn.Linear(reader.config.text_config.hidden_size, recipe.output_dim, bias=False)
        reader.load(checkpoint_state(checkpoint, base, recipe, reader), head, checkpoint)
        return cls(reader, recipe, template, config)

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score. Motion is read from a grayscale row of the same forward."""
        if not clips:
            return torch.empty(len(self.components), 0)
        rows = [question for clip in clips for question in self._questions(clip)]
        per_clip = len(rows) // len(clips)
        raw_NKD = self._judge.ask_all(rows, "video", self._max_clips * per_clip)
        raw_NK = raw_NKD[..., 0] if raw_NKD.shape[-1] == 1 else raw_NKD.diagonal(dim1=1, dim2=2)
        raw_BRK = raw_NK.reshape(len(clips), per_clip, len(ASPECTS))
        mean_K, std_K = (torch.tensor(v) for v in (self._recipe.mean, self._recipe.std))
        raw_BK = torch.stack([raw_BRK[:, 0, 0], raw_BRK[:, -1, 1], raw_BRK[:, 0, 2]], dim=1)
        scores_BK = (raw_BK - mean_K.to(raw_BK)) / std_K.to(raw_BK)
        return scores_BK.T.contiguous().to(clips[0].frames_FCHW.device)

    def _questions(self, clip: Clip) -> list[Question]:
        """The clip in colour and, if motion is judged on it, in gray."""
        places = self._recipe.frame_positions(len(clip.frames_FCHW), self._pixel_fps)
        frames_FCHW = clip.frames_FCHW[places]
        text = self._template.replace(TEXT_FIELD, joined_texts([s.text for s in clip.spans]))
        shown = [frames_FCHW, gray(frames_FCHW)] if self._grayscale else [frames_FCHW]
        limits = {"min_pixels": MIN_PIXELS, "max_pixels": self._recipe.max_pixels}
        return [Question(frames_FCHW=self._judge.fit(f, **limits), text=text) for f in shown]


def gray(frames_FCHW: Tensor) -> Tensor:
    """Luma in three channels."""
    luma_FHW = torch.einsum("fchw,c->fhw", frames_FCHW, frames_FCHW.new_tensor(LUMA))
    return luma_FHW[:, None].expand(-1, 3, -1, -1)
