"""Checkpoints of a tiny random Wan, in the forms that others write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_kvpo.checkpoint.export import diffusers_config
from megatron_kvpo.checkpoint.mapping import Sizes, adapter_table, base_table
from megatron_kvpo.parallel.seeds import noise

SIZES = Sizes(hidden=64, ffn=96, layers=2, channels=4, text=16, sinusoid=32, rank=4)
HEADS, ALPHA = 4, 6.0


def base(sizes: Sizes = SIZES) -> dict[str, Tensor]:
    """Released names; weights at which every part of the model matters."""
    found = {}
    for name, row in base_table(sizes).items():
        drawn = noise(row.shape, "tiny checkpoint", name)
        if "norm" in name and name.endswith("weight"):
            found[name] = 1 + 0.2 * drawn
        elif name.endswith("weight"):
            found[name] = drawn / drawn[0].numel() ** 0.5
        else:
            found[name] = 0.3 * drawn
    return found


def adapter(sizes: Sizes = SIZES) -> dict[str, Tensor]:
    """Our names, `<module>.lora_A`."""
    return {n: 0.2 * noise(r.shape, "tiny adapter", n) for n, r in adapter_table(sizes).items()}


def peft_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As PEFT names them on Wan's own model."""
    return {f"base_model.model.{name}.weight": value for name, value in tensors.items()}


def write_original(path: Path, tensors: dict[str, Tensor] | None = None, prefix: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = base() if tensors is None else tensors
    save_file({f"{prefix}{n}": t.contiguous() for n, t in tensors.items()}, path)
    return path


def write_longlive(folder: Path) -> tuple[Path, Path]:
    """longlive_base.pt and lora.pt, with what else LongLive's trainer leaves in them."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = {f"model.{name}": value for name, value in base().items()}
    critic = {f"model.{name}": torch.zeros(2) for name in base()}
    torch.save({"generator": generator, "critic": critic, "step": 700},
               folder / "longlive_base.pt")  # fmt: skip
    lora = {"generator_lora": peft_keys(adapter()), "critic_lora": {"x": torch.zeros(1)},
            "step": 3000}  # fmt: skip
    torch.save(lora, folder / "lora.pt")
    return folder / "longlive_base.pt", folder / "lora.pt"


def diffusers_model(tensors: dict[str, Tensor] | None = None, sizes: Sizes = SIZES) -> Any:
    """diffusers' own class, filled by the names that it gives its tensors."""
    from diffusers import WanTransformer3DModel

    config = diffusers_config(sizes, HEADS)
    net = WanTransformer3DModel.from_config(config)
    tensors = base(sizes) if tensors is None else tensors
    table = base_table(sizes)
    net.load_state_dict({table[name].diffusers: value for name, value in tensors.items()})
    return net.eval()


@torch.no_grad()
def run(net: Any, sizes: Sizes = SIZES) -> Tensor:
    """Output of a diffusers model on one fixed input."""
    latent = noise((1, sizes.channels, 3, 4, 4), "latent")
    text = noise((1, 5, sizes.text), "text")
    return net(latent, torch.tensor([8.0]), text, return_dict=False)[0]
