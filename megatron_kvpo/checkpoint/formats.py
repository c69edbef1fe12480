"""Reading a checkpoint of any form, tensor by tensor, under the released names.

folder of Wan, diffusers    config.json, diffusion_pytorch_model*.safetensors, perhaps an index
folder of PEFT              adapter_config.json, adapter_model.safetensors
x.safetensors               any keys: original, diffusers, ComfyUI, with wrappers' prefixes
x.pt, x.pth, x.bin, x.ckpt  the same, perhaps under `generator`, `generator_ema`, ...
step_<number>               ours, from an import or a run; or the folder of several

`open_checkpoint` tells them apart and reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megatron_kvpo.checkpoint import state
from megatron_kvpo.checkpoint.mapping import is_adapter, released_name
from megatron_kvpo.checkpoint.stores import (
    Cut,
    DistributedStore,
    Header,
    PickleStore,
    SafetensorsStore,
    Store,
)
from megatron_kvpo.model.frozen import indexed_files
from megatron_kvpo.model.lora import SLOTS
from megatron_kvpo.model.weights import bare_name

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
MODEL_FILE = "diffusion_pytorch_model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint: its tensors by released name, and what its folder says beside them."""

    path: Path
    form: str
    """`original`, `diffusers`, `comfyui`, `peft` or `distributed`."""

    store: Store
    stored: dict[str, str]
    """Released name -> name in the store."""

    foreign: tuple[str, ...] = ()
    """Stored names that are no tensor of a Wan model or an adapter."""

    section: str = ""
    layers: int | None = None
    """Layers according to its config.json."""

    heads: int | None = None
    alpha: float | None = None
    """Of the adapter; None if the file does not say."""

    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By released name."""
        return {name: self.header(name).shape for name in self.stored}

    @property
    def has_base(self) -> bool:
        """Whether it holds more than an adapter."""
        return any(not is_adapter(name) for name in self.stored)

    @property
    def has_adapter(self) -> bool:
        """Whether it holds an adapter."""
        return any(is_adapter(name) for name in self.stored)

    def header(self, name: str) -> Header:
        """Shape and type of a tensor, by released name."""
        return self.store.headers[self.stored[name]]

    def read(self, name: str, cut: Cut = None) -> Tensor:
        """A tensor or a part of it, by released name."""
        return self.store.read(self.stored[name], cut)


def open_checkpoint(path: Path, *, key: str | None = None, slot: str = "current") -> Checkpoint:
    """Find out what lies at `path` and list its tensors. Reads no weights.

    Args:
        path: file or folder of any of the module's forms.
        key: part of a .pt file; None takes the first of generator_ema, generator, generator_lora.
        slot: which policy of a run's checkpoint.

    Raises:
        ValueError: nothing readable lies there, a file is cut short or unsafe to open, a tensor
            comes twice.
    """
    if path.is_dir():
        return _open_folder(path, slot)
    if path.suffix == ".safetensors":
        store = SafetensorsStore([path])
        return _listed(path, store, alpha=_lora_alpha(store.metadata))
    if path.suffix in PICKLES and path.is_file():
        pickled = PickleStore(path, key)
        return _listed(path, pickled, section=pickled.section)
    raise ValueError(
        f"no checkpoint at {path}: give a folder, a .safetensors file or one of {list(PICKLES)}"
    )


def _open_folder(path: Path, slot: str) -> Checkpoint:
    if (path / "model_index.json").is_file():
        return _open_folder(path / "transformer", slot)
    if (path / ADAPTER_CONFIG).is_file():
        alpha = float(peft_config(path).lora_alpha)
        return _listed(path, SafetensorsStore([path / ADAPTER_FILE]), alpha=alpha)
    if (path / ".metadata").is_file() or state.newest(path) is not None:
        return _open_distributed(state.newest(path) or path, slot)
    config_file = path / "config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    store = SafetensorsStore(list(_weight_files(path)))
    return _listed(
        path, store, layers=config.get("num_layers"), alpha=_lora_alpha(store.metadata),
        heads=config.get("num_heads", config.get("num_attention_heads")), extra=config,
    )  # fmt: skip


def _weight_files(folder: Path) -> Iterator[Path]:
    """The safetensors files of a model's folder: those of its index, or the only one."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        yield from indexed_files(indices[0])
        return
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} holds {len(files)} safetensors files and no index, no adapter and no "
            "checkpoint of ours: give the folder of one model, or the file itself"
        )
    yield files[0]


def _lora_alpha(metadata: Mapping[str, str]) -> float | None:
    """Alpha from the note that diffusers leaves in a LoRA file."""
    note = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alphas = {float(value) for name, value in note.items() if name.endswith("lora_alpha")}
    return alphas.pop() if len(alphas) == 1 else None


def _listed(path: Path, store: Store, *, alpha: float | None = None, **facts: Any) -> Checkpoint:
    """Sort a store's tensors into the model's, alphas and foreign ones."""
    stored: dict[str, str] = {}
    foreign, alphas = [], {}
    for raw in store.headers:
        name = released_name(bare_name(raw))
        if raw.endswith(".alpha") and not store.headers[raw].shape:
            alphas[raw] = float(store.read(raw))
        elif name is None:
            foreign.append(raw)
        elif name in stored:
            raise ValueError(f"{path}: {raw} and {stored[name]} are both {name}")
        else:
            stored[name] = raw
    if len(set(alphas.values())) > 1:
        raise ValueError(
            f"{path}: its layers have alphas {sorted(set(alphas.values()))}, one for all is needed"
        )
    if alphas:
        alpha = next(iter(alphas.values()))
    return Checkpoint(
        path=path, form=_form(stored), store=store, stored=stored, foreign=tuple(foreign),
        alpha=alpha, **facts,
    )  # fmt: skip


def _form(stored: Mapping[str, str]) -> str:
    """Whose keys these are."""
    if any("diffusion_model." in raw for raw in stored.values()):
        return "comfyui"
    if stored and all(is_adapter(name) for name in stored):
        return "peft"
    renamed = any(".attn1." in raw or "condition_embedder." in raw for raw in stored.values())
    return "diffusers" if renamed else "original"


def _open_distributed(path: Path, slot: str) -> Checkpoint:
    if slot not in SLOTS:
        raise ValueError(f"no slot {slot!r}: there are {SLOTS}")
    store = DistributedStore(path)
    full = any(raw.startswith(f"slots.slots.{slot}.") for raw in store.headers)
    stored: dict[str, str] = {}
    foreign = []
    for raw in store.headers:
        own = _slot_name(raw, slot, full)
        if own is None:
            continue
        name = released_name(own)
        if name is None:
            foreign.append(raw)
        else:
            stored[name] = raw
    if slot != "current" and not full and not any(is_adapter(name) for name in stored):
        raise ValueError(f"{path} holds no weights of slot {slot!r}: ask for slot 'current'")
    facts = store.common.get("weights") or _run_facts(path)
    return Checkpoint(
        path=path, form="distributed", store=store, stored=stored, foreign=tuple(foreign),
        heads=facts.get("heads"), alpha=facts.get("alpha"), layers=facts.get("layers"),
        section=slot,
    )  # fmt: skip


def _slot_name(raw: str, slot: str, full: bool) -> str | None:
    """Name of a stored tensor among the weights of `slot`; None if it is of another or no weight.

    `full`: the slot is a whole copy of the weights, not an adapter.
    """
    if raw.startswith(f"slots.slots.{slot}."):
        return raw.removeprefix(f"slots.slots.{slot}.").replace("/", ".")
    if full or raw.startswith(("optimizer.", "slots.")):
        return None
    if ".adapter." in raw:
        name, _, kept = raw.replace(".adapter.", ".").rpartition(".")
        return name if kept == slot else None
    return raw


def _run_facts(path: Path) -> dict[str, Any]:
    """What the settings of the run that wrote a checkpoint add to its tensors."""
    recipe = path.parent.parent / "config.yaml"
    if not recipe.is_file():
        return {}
    settings = yaml.safe_load(recipe.read_text())
    model, policy = settings.get("model", {}), settings.get("policy", {})
    return {
        "heads": model.get("num_heads"), "layers": model.get("num_layers"),
        "alpha": policy.get("lora_alpha"),
    }  # fmt: skip


_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False, None), "use_dora": (False, None), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "bias": ("none",), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "modules_to_save": (None, []), "layers_to_transform": (None, []),
    "init_lora_weights": (True, False, "gaussian"),
}  # fmt: skip
"""Settings of PEFT and the values at which an adapter is W + alpha / r B A and nothing more."""


def peft_config(folder: Path) -> Any:
    """PEFT's LoraConfig of an adapter folder. ValueError if it is more than plain LoRA."""
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder} is a {type(config).__name__}: only LoRA adapters are read")
    for name, values in _PLAIN_LORA.items():
        value = vars(config).get(name)
        if value not in values:
            raise ValueError(
                f"{folder / ADAPTER_CONFIG} sets {name} to {value!r}: only plain LoRA is read, "
                f"with {name} {values[0]!r}"
            )
    return config
