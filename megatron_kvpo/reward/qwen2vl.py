"""Qwen2-VL read at marked tokens: a body from local files, weights of other makers, inputs.

transformers is imported when a reader is built, not before. Nothing is downloaded, and no file can
run code.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from megatron_kvpo.model.frozen import fill, read_pickle, read_safetensors

TEXT_FIELD = "{text_prompt}"
"""Where a template wants the text."""

INDEX_FILE, WEIGHTS_FILE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

WRAPPERS = ("base_model.model.", "module.")
"""What PEFT and DeepSpeed put before a name."""

TEXT_PARTS = ("embed_tokens.", "layers.", "norm.")
"""Parts of the text model; transformers before 4.52 has them beside the vision tower."""

EMBEDDING = "language_model.embed_tokens.weight"
HEAD = "rm_head."

Kind = Literal["image", "video"]


def required(path: Path | None, setting: str, what: str) -> Path:
    """A path that must be there. ValueError with the setting and what belongs there."""
    if path is None:
        raise ValueError(f"reward.{setting} is not set: give {what}")
    if not path.exists():
        raise ValueError(f"reward.{setting} is {path}, which does not exist: give {what}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """An object. ValueError with the file for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}: a JSON object is needed")
    return found


def read_template(path: Path, constants: Sequence[str], markers: Sequence[str]) -> str:
    """What the model is asked: a Python file's string constants, joined, or a text file as it is.

    The Python file is parsed, never run. ValueError unless `{text_prompt}` is in it, and each
    marker once.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error
    if path.suffix == ".py":
        text = "".join(_constants(text, constants, path))
    counts = {marker: text.count(marker) for marker in markers if text.count(marker) != 1}
    if TEXT_FIELD not in text or counts:
        raise ValueError(
            f"the template of {path} has {TEXT_FIELD} {text.count(TEXT_FIELD)} times and of its "
            f"markers {counts or 'each once'}: it needs {TEXT_FIELD}, and each of {list(markers)} "
            "once"
        )
    return text


def _constants(source: str, names: Sequence[str], path: Path) -> list[str]:
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is no Python: {error}") from error
    found = {
        target.id: node.value.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{path} assigns no plain string to {missing}: give the file of the model's own code, "
            "or a text file with the template"
        )
    return [found[name] for name in names]


def smart_resize(
    height: int, width: int, factor: int, *, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Qwen's rule: sides that are multiples of `factor`, pixels within bounds, about the aspect.

    ValueError for an image that is more than 200 times as long as wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"pixel frames of {height} x {width}: Qwen2-VL takes 200 to 1 at most")
    rounded = (max(1, round(height / factor)), max(1, round(width / factor)))
    pixels = rounded[0] * rounded[1] * factor**2
    if pixels > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rounded = (max(1, int(height / beta / factor)), max(1, int(width / beta / factor)))
    elif pixels < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rounded = (math.ceil(height * beta / factor), math.ceil(width * beta / factor))
    return rounded[0] * factor, rounded[1] * factor


def resize(frames_FCHW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, in [0, 1]."""
    if frames_FCHW.shape[-2:] == (height, width):
        return frames_FCHW
    resized_FCHW: Tensor = interpolate(
        frames_FCHW, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized_FCHW.clamp(0, 1)


def patchify(frames_FCHW: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """`patches_PD` as Qwen2-VL's processors order them: by merged squares, D = (C, time, y, x).

    The last pixel frame is repeated until their number is a multiple of `temporal`.
    """
    missing = -len(frames_FCHW) % temporal
    frames_FCHW = torch.cat([frames_FCHW, frames_FCHW[-1:].expand(missing, -1, -1, -1)])
    channels, height, width = frames_FCHW.shape[1:]
    side = patch * merge
    split = frames_FCHW.reshape(
        -1, temporal, channels, height // side, merge, patch, width // side, merge, patch
    )  # [T, time, C, row, row in square, y, column, column in square, x]
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * temporal * patch * patch)


def local_name(name: str) -> str | None:
    """A tensor's name in transformers' Qwen2VLModel, `rm_head` beside it; None if it is not used.

    Knows the names before and since transformers 4.52 and PEFT's; `.lora_A.weight` stays a suffix.
    """
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    while name.startswith("model."):
        name = name.removeprefix("model.")
    if name.startswith("lm_head.") or ".original_module." in name or name.endswith("inv_freq"):
        return None
    for part in (".base_layer", ".modules_to_save.default"):
        name = name.replace(part, "")
    for side in ("A", "B"):
        name = name.replace(f".lora_{side}.default.", f".lora_{side}.")
    return f"language_model.{name}" if name.startswith(TEXT_PARTS) else name


def read_weights(*paths: Path) -> dict[str, Tensor]:
    """Tensors of safetensors or `.pth` files by their local names, mapped, not copied.

    ValueError with the file for what is missing, damaged or unsafe, or has one tensor twice.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is not there: fetch it again")
        pickled = path.suffix in (".pth", ".pt", ".bin")
        tensors = read_pickle(path).items() if pickled else read_safetensors([path])
        for foreign, tensor in tensors:
            name = local_name(foreign)
            if name in found:
                raise ValueError(f"{path} has {foreign}, which is there by another name: {name}")
            if name is not None:
                found[name] = tensor
    return found


def base_weights(base: Path) -> dict[str, Tensor]:
    """Tensors of a transformers folder of safetensors, by local names. ValueError as above."""
    index = base / INDEX_FILE
    if not index.is_file():
        return read_weights(base / WEIGHTS_FILE)
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index} has no weight_map")
    return read_weights(*(base / str(name) for name in sorted(set(files.values()))))


class _Headed(nn.Module):
    """The reward head by the name that files have for it."""

    def __init__(self, rm_head: nn.Module) -> None:
        super().__init__()
        self.rm_head = rm_head


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One row: what is shown, and the text that goes with it."""

    frames_FCHW: Tensor
    """What `Reader.fit` returned; one for an image."""

    text: str


class Reader:
    """A Qwen2-VL body, the tokens at which it is read, and a head. Frozen, on its device."""

    def __init__(self, base: Path, markers: Sequence[str], device: torch.device) -> None:
        """Tokenizer and sizes of a local folder; `load` brings the weights.

        bfloat16 on a GPU, float32 elsewhere. ValueError for a folder that is no Qwen2-VL.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoTokenizer, Qwen2VLConfig

        settings = read_json(base / "config.json")
        if settings.get("model_type") != "qwen2_vl":
            kind = settings.get("model_type")
            raise ValueError(
                f"{base / 'config.json'} is of model_type {kind!r}: qwen2_vl is needed"
            )
        if not any((base / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"{base} has no tokenizer: {' or '.join(TOKENIZER_FILES)} is needed")
        try:
            self.config: Any = Qwen2VLConfig.from_dict(settings)
        except StrictDataclassError as error:
            raise ValueError(f"{base / 'config.json'} is refused: {error}") from error
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._vision: Any = self.config.vision_config
        self._shown = {"image": self.config.image_token_id, "video": self.config.video_token_id}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
        self._tokenizer.add_tokens(list(markers), special_tokens=True)
        self._markers = {m: int(self._tokenizer.convert_tokens_to_ids(m)) for m in markers}
        self._chat = _chat_template(base, self._tokenizer)
        self._mean_C, self._std_C = _pixel_statistics(base / "preprocessor_config.json", device)
        self._model: Any = None
        self._head: Any = None

    def load(self, state: Mapping[str, Tensor], head: nn.Module, source: Path) -> None:
        """Take body and head from a state of local names. ValueError for any that does not fit."""
        from transformers import Qwen2VLModel

        heads = {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}
        if not heads:
            raise ValueError(f"{source} has no {HEAD}* tensor: it is no reward model")
        headed = _Headed(head)
        fill(headed, self._placed(heads, torch.float32), torch.float32, source)
        body = {name: tensor for name, tensor in state.items() if name not in heads}
        rows, needed = body.get(EMBEDDING, torch.empty(0)), len(self._tokenizer)
        if len(rows) < needed:
            raise ValueError(
                f"{source} has an embedding of {len(rows)} rows, the tokenizer {needed} tokens: "
                "they do not belong together"
            )
        self.config.text_config.vocab_size = len(rows)
        with torch.device("meta"):
            model = Qwen2VLModel(self.config)
        fill(model, self._placed(body, self.dtype), self.dtype, source)
        for owner, name in ((model.language_model, "rotary_emb"), (model.visual, "rotary_pos_emb")):
            setattr(owner, name, _rounded_rotary(getattr(owner, name), owner.config))
        self._model, self._head = model.to(self.device), headed.rm_head

    def _placed(
        self, state: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor.to(self.device, dtype)) for name, tensor in state.items())

    def fit(self, frames_FCHW: Tensor, *, min_pixels: int, max_pixels: int) -> Tensor:
        """Pixel frames on the reader's device, in a size that it takes, see `smart_resize`."""
        factor = self._vision.patch_size * self._vision.spatial_merge_size
        height, width = frames_FCHW.shape[-2:]
        height, width = smart_resize(
            height, width, factor, min_pixels=min_pixels, max_pixels=max_pixels
        )
        return resize(frames_FCHW.to(self.device, torch.float32), height, width)

    def ask_all(self, questions: Sequence[Question], kind: Kind, at_once: int) -> Tensor:
        """As `ask` for any sizes: those of one size together, at most `at_once` a forward."""
        found: dict[int, Tensor] = {}
        groups: dict[torch.Size, list[int]] = {}
        for place, question in enumerate(questions):
            groups.setdefault(question.frames_FCHW.shape, []).append(place)
        for group in groups.values():
            for start in range(0, len(group), at_once):
                places = group[start : start + at_once]
                found |= zip(places, self.ask([questions[i] for i in places], kind), strict=True)
        return torch.stack([found[place] for place in range(len(questions))])

    @torch.no_grad()
    def ask(self, questions: Sequence[Question], kind: Kind) -> Tensor:
        """The head at each marker of each row, float32 [B, markers, outputs]; one size is shown.

        Texts are padded on the right, which a causal model cannot see: no mask is needed.
        """
        rows = [self.token_ids(q, kind) for q in questions]
        longest = max(map(len, rows))
        ids_BL = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        shown = "pixel_values" if kind == "image" else "pixel_values_videos"
        output = self._model(
            input_ids=ids_BL.to(self.device), use_cache=False,
            position_ids=positions(len(rows), longest, self.device), **{
                shown: torch.cat([self.patches(q.frames_FCHW) for q in questions]),
                f"{kind}_grid_thw": torch.tensor(
                    [self.grid(q.frames_FCHW) for q in questions], device=self.device
                ),
            },
        )  # fmt: skip
        places_BK = [[row.index(marker) for marker in self._markers.values()] for row in rows]
        marked = [row[at] for row, at in zip(output.last_hidden_state, places_BK, strict=True)]
        scores_BKD: Tensor = self._head(torch.stack(marked).float())
        return scores_BKD

    def patches(self, frames_FCHW: Tensor) -> Tensor:
        """`patches_PD`, normalised as the base's processor does, in the body's dtype."""
        vision = self._vision
        shown = (frames_FCHW - self._mean_C[:, None, None]) / self._std_C[:, None, None]
        sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        return patchify(shown, *sizes).to(self.dtype)

    def grid(self, frames_FCHW: Tensor) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        height, width = (side // self._vision.patch_size for side in frames_FCHW.shape[-2:])
        return math.ceil(len(frames_FCHW) / self._vision.temporal_patch_size), height, width

    def token_ids(self, question: Question, kind: Kind) -> list[int]:
        """One user turn, the shown thing before the text, and the beginning of an answer.

        ValueError if the text itself has a token that stands for the shown thing or is a marker.
        """
        content = [{"type": kind, kind: ""}, {"type": "text", "text": question.text}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._chat, tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        shown = self._shown[kind]
        once = {f"<|{kind}_pad|>": shown, **self._markers}
        wrong = {name: ids.count(token) for name, token in once.items() if ids.count(token) != 1}
        if wrong:
            raise ValueError(
                f"the question has {wrong} of tokens that it needs once: leave them out of the "
                "prompts, and check template and tokenizer"
            )
        repeats = math.prod(self.grid(question.frames_FCHW)) // self._vision.spatial_merge_size**2
        place = ids.index(shown)
        return [*ids[:place], *[shown] * repeats, *ids[place + 1 :]]


def positions(num_rows: int, length: int, device: torch.device) -> Tensor:
    """0, 1, 2, ... on all three axes, [3, B, L], also through what is shown.

    Both released reward models call the text model without positions, which in their transformers
    (4.45.2) counts tokens; Qwen2-VL itself counts by time, row and column there (get_rope_index).
    """
    return torch.arange(length, device=device).expand(3, num_rows, length)


def _rounded_rotary(rotary: nn.Module, config: Any) -> nn.Module:
    """Rotary frequencies in bfloat16, to which casting rounded them in both released models."""
    made: nn.Module = type(rotary)(config)
    for frequencies in made.buffers():
        frequencies.copy_(frequencies.bfloat16())
    return made


def _chat_template(base: Path, tokenizer: Any) -> str:
    beside = base / "chat_template.json"
    text = read_json(beside).get("chat_template") if beside.is_file() else tokenizer.chat_template
    if not isinstance(text, str):
        raise ValueError(f"{base} has no chat template: fetch tokenizer_config.json again")
    return text


def _pixel_statistics(path: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [3] of the processor."""
    settings = read_json(path)
    try:
        mean_C, std_C = (
            torch.tensor(settings[name], dtype=torch.float32)
            for name in ("image_mean", "image_std")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no image_mean and image_std of numbers: {error}") from error
    if mean_C.shape != (3,) or std_C.shape != (3,):
        raise ValueError(f"{path} has image_mean and image_std of other than 3 numbers")
    return mean_C.to(device), std_C.to(device)
