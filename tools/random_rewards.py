"""VideoReward and HPSv3 of random weights, in the layout of the released files.

    python -m tools.random_rewards --model videoreward --folder /tmp/videoreward
    python -m tools.random_rewards --model hpsv3 --folder /tmp/hpsv3 --size tiny

To measure and to try settings without the released files, whose sizes they have. A text is one
token a byte. Prints the overrides with which a recipe takes them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.reward import hpsv3, videoreward
from megatron_kvpo.reward.qwen2vl import TEXT_FIELD

logger = log.get_logger("megatron_kvpo.tools.random_rewards")

Model = Literal["videoreward", "hpsv3"]

SIZES: dict[str, dict[str, Any]] = {
    "videoreward": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
    "hpsv3": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300},
}  # fmt: skip
"""Of Qwen2-VL-2B and 7B, and something that a laptop holds."""

VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
TINY_VISION = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2}

QUESTION_TOKENS = 900
"""About the length of what both models are asked."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("videoreward", "hpsv3"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    options = parser.parse_args(arguments)
    overrides = write(options.model, options.folder, tiny=options.size == "tiny")
    logger.info("%s", shlex.join(overrides))
    return 0


def write(model: Model, folder: Path, *, tiny: bool = False) -> list[str]:
    """Files of one model in `folder`; what a recipe is overridden with to take them."""
    base = folder / "base"
    ids = write_base(base, SIZES["tiny" if tiny else model], TINY_VISION if tiny else VISION)
    markers = videoreward.MARKERS if model == "videoreward" else hpsv3.MARKERS
    filler = "x " * (QUESTION_TOKENS // 2)
    (folder / "question.txt").write_text(f"{filler}{TEXT_FIELD} {' '.join(markers)}")
    settings = json.loads((base / "config.json").read_text())
    state = random_state(settings, max(settings["vocab_size"], ids + len(markers)))
    if model == "hpsv3":
        head = hpsv3.rank_head(settings["hidden_size"]).state_dict()
        state |= {f"rm_head.{name}": tensor for name, tensor in head.items()}
        save_file(state, folder / "HPSv3.safetensors")
        names = {"weights": folder / "HPSv3.safetensors"}
    else:
        state["rm_head.weight"] = torch.randn(3, settings["hidden_size"]) / 30
        checkpoint = folder / f"{videoreward.STEP_FOLDER}1"
        checkpoint.mkdir(exist_ok=True)
        save_file(state, checkpoint / videoreward.WHOLE_FILES[0])
        (folder / videoreward.CONFIG_FILE).write_text(json.dumps({
            "data_config": {"max_frame_pixels": 448 * 448, "num_frames": None, "fps": 2},
            "model_config": {"output_dim": 3, "use_special_tokens": True},
        }))  # fmt: skip
        names = {"folder": folder}
    section = "video_reward" if model == "videoreward" else "hpsv3"
    paths = {**names, "base": base, "template": folder / "question.txt"}
    return [f"reward.{section}.{name}={path}" for name, path in paths.items()]


def write_base(base: Path, text: dict[str, Any], vision: dict[str, int]) -> int:
    """config.json, tokenizer and processor of a Qwen2-VL; returns how many tokens there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: number for number, token in enumerate([*alphabet, *SPECIAL])}
    core = Tokenizer(models.BPE(vocab={token: ids[token] for token in alphabet}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=SPECIAL[0], eos_token=SPECIAL[2],
                            chat_template=_CHAT).save_pretrained(base)  # fmt: skip
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    (base / "config.json").write_text(json.dumps({
        "model_type": "qwen2_vl", **text, "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"], "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "vision_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl", **vision, "hidden_size": text["hidden_size"],
            "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }))  # fmt: skip
    (base / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]})
    )
    return len(ids)


def random_state(settings: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """A body's tensors in bfloat16, drawn on a GPU if there is one."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig.from_dict({**settings, "vocab_size": rows})
    config.text_config.vocab_size = rows
    with torch.device("meta"):
        shapes = Qwen2VLModel(config).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator(device).manual_seed(0)
    drawn = {}
    for name, tensor in shapes.items():
        fan = tensor[0].numel() if tensor.dim() > 1 else 1
        value = torch.randn(tensor.shape, generator=rng, device=device) / fan**0.5
        if "norm" in name or "ln_q" in name:
            value = 1 + 0.1 * value
        drawn[name] = value.to(torch.bfloat16).cpu()
    return drawn


if __name__ == "__main__":
    log.setup(True)
    sys.exit(main())
