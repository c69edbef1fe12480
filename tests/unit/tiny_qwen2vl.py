"""A tiny random Qwen2-VL in a folder like the released ones, and its tensors by older names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

HIDDEN, PATCH, MERGE = 64, 14, 2
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = {token: i for i, token in enumerate([*BYTES, *SPECIAL])}
BASE_ROWS = len(IDS) + 9
"""Like the released models', more than there are tokens."""

CHAT_TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}\
<|im_start|>system
Be helpful.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}\
<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def asked(kind: str, text: str) -> str:
    """What the chat template makes of one user turn."""
    return (
        "<|im_start|>system\nBe helpful.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def tokenizer() -> Any:
    """Bytes, and Qwen's special tokens."""
    import transformers

    core = Tokenizer(models.BPE(vocab={byte: IDS[byte] for byte in BYTES}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def sizes(rows: int = BASE_ROWS) -> dict[str, Any]:
    """config.json, flat as the released one is."""
    return {
        "model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": rows,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True, "torch_dtype": "float32",
        "image_token_id": IDS["<|image_pad|>"], "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"], "vision_token_id": IDS["<|video_pad|>"],
        "vision_config": {
            "model_type": "qwen2_vl", "depth": 2, "embed_dim": 32, "hidden_size": HIDDEN,
            "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "in_channels": 3, "patch_size": PATCH,
            "spatial_merge_size": MERGE, "spatial_patch_size": PATCH, "temporal_patch_size": 2,
        },
    }  # fmt: skip


def model(rows: int, seed: int = 0) -> Any:
    """transformers' own class with weights at which every part matters; float32."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen2VLConfig.from_dict(sizes(rows))
    made = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
        elif "norm" in name or "ln_q" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.2)
        else:
            nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(made.get_input_embeddings().weight, std=1.0)
    made.tie_weights()
    return made


def rounded(made: Any) -> Any:
    """The same with rotary frequencies as casting to bfloat16 leaves them."""
    for name, buffer in made.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(buffer.bfloat16())
    return made


def older(name: str) -> str:
    """The name before transformers 4.52."""
    name = name.replace("model.language_model.", "model.")
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def state_of(made: Any) -> dict[str, Tensor]:
    """A model's tensors by today's names, no two of which share memory."""
    return {name: tensor.detach().clone() for name, tensor in made.state_dict().items()}


def save_base(folder: Path, state: dict[str, Tensor]) -> Path:
    """config.json, weights in two shards by older names, tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(sizes()))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_mean": MEAN, "image_std": STD, "patch_size": PATCH, "merge_size": MERGE,
        "temporal_patch_size": 2, "min_pixels": 3136, "max_pixels": 12845056,
    }))  # fmt: skip
    names = sorted(name for name in state if name != "lm_head.weight")
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({older(name): state[name] for name in part}, folder / file)
        index |= {older(name): file for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def patches_by_hand(shown_FCHW: Tensor) -> Tensor:
    """`patches_PD` of an even number of pixel frames, patch by patch."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    normal = (shown_FCHW - mean) / std
    rows, columns = (side // PATCH for side in shown_FCHW.shape[-2:])
    found = []
    for time in range(0, len(normal), 2):
        for top in range(0, rows, MERGE):
            for left in range(0, columns, MERGE):
                for y in range(top, top + MERGE):
                    for x in range(left, left + MERGE):
                        patch = normal[
                            time : time + 2, :, y * PATCH : (y + 1) * PATCH,
                            x * PATCH : (x + 1) * PATCH,
                        ]  # fmt: skip
                        found.append(patch.transpose(0, 1).flatten())
    return torch.stack(found)


def hidden_by_hand(made: Any, ids: list[int], kind: str, patches_PD: Tensor, grid: Any) -> Tensor:
    """Last hidden state [L, D] of transformers' own model, positions counted along the tokens."""
    name = {"image": "pixel_values", "video": "pixel_values_videos"}[kind]
    with torch.no_grad():
        output = made.model(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            position_ids=torch.arange(len(ids)).expand(3, 1, -1),
            **{name: patches_PD, f"{kind}_grid_thw": torch.tensor([grid])},
        )  # fmt: skip
    return output.last_hidden_state[0]
