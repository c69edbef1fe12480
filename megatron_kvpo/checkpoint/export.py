"""Out of any checkpoint into the forms that other programs read, with proof.

What was written is opened again through the reader, under names mapped back, and compared with its
source bit for bit; a caller may add a proof of its own. Only then does it get its name.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_kvpo.checkpoint.convert import (
    alpha_of,
    check_same_model,
    checked,
    heads_of,
    same_bits,
)
from megatron_kvpo.checkpoint.formats import (
    ADAPTER_FILE,
    LORA_FILE,
    MODEL_FILE,
    Checkpoint,
    open_checkpoint,
)
from megatron_kvpo.checkpoint.mapping import Row, Sizes, is_adapter
from megatron_kvpo.checkpoint.stores import DTYPES, Header

Target = Literal["original", "diffusers", "peft", "comfyui", "merged"]
Keys = Literal["original", "diffusers", "comfyui"]

EPS = 1e-6
"""Of every norm of Wan."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to write: its name in the file, ours, and where it comes from."""

    name: str
    own: str
    header: Header
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What an export may draw on: a complete base, a complete adapter, or both of one model."""

    base: Checkpoint | None
    adapter: Checkpoint | None
    sizes: Sizes
    table: dict[str, Row]
    alpha: float
    heads: int | None
    """None if there is no base, or if it is not known."""

    @staticmethod
    def of(
        source: Checkpoint, adapter: Checkpoint | None = None, *, alpha: float | None = None,
        heads: int | None = None, layers: int | None = None,
    ) -> Weights:  # fmt: skip
        """Check what is there. `adapter` takes the place of one in `source`."""
        sizes, table = checked(source, layers)
        base = source if source.has_base else None
        if adapter is None and source.has_adapter:
            adapter = source
        if adapter is not None and adapter is not source:
            adapter_sizes, rows = checked(adapter, layers)
            if adapter.has_base:
                raise ValueError(f"{adapter.path} is more than an adapter: give it as the source")
            check_same_model(sizes, adapter_sizes, adapter)
            table = {n: r for n, r in table.items() if not is_adapter(n)} | rows
            sizes = replace(sizes, rank=adapter_sizes.rank)
        return Weights(
            base=base, adapter=adapter, sizes=sizes, table=table,
            alpha=alpha_of(adapter, sizes, alpha) if adapter else 0.0,
            heads=heads_of(source, sizes, heads) if base else heads,
        )  # fmt: skip

    @property
    def scale(self) -> float:
        """Factor on B A."""
        return self.alpha / self.sizes.rank

    def merged(self, name: str) -> Tensor:
        """W + scale B A in float32 where there is an adapter, else W in float32."""
        assert self.base is not None
        assert self.adapter is not None
        weight = self.base.read(name).float()
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in self.table:
            up, down = (self.adapter.read(f"{module}.lora_{half}").float() for half in "BA")
            weight.addmm_(up, down, alpha=self.scale)
        return weight


def plan_base(
    weights: Weights, keys: Keys, dtype: torch.dtype | None, *, merge: bool = False
) -> list[Planned]:
    """Every tensor of the base (with `merge`: the adapter in it) under the names of `keys`."""
    base, planned = weights.base, []
    if base is None:
        raise ValueError("there is no base here, an adapter only: export it with --to peft")
    for row in weights.table.values():
        if is_adapter(row.name):
            continue
        header = Header(row.shape, dtype or base.header(row.name).dtype)

        def read(name: str = row.name, dtype: torch.dtype = header.dtype) -> Tensor:
            return (weights.merged(name) if merge else base.read(name)).to(dtype)

        names = {"original": row.name, "diffusers": row.diffusers,
                 "comfyui": f"model.diffusion_model.{row.name}"}  # fmt: skip
        planned.append(Planned(names[keys], row.name, header, read))
    return planned


def plan_adapter(
    weights: Weights, prefix: str, dtype: torch.dtype | None, *, diffusers: bool
) -> list[Planned]:
    """Every A and B, named `<prefix><module>.lora_A.weight`."""
    adapter, planned = weights.adapter, []
    if adapter is None:
        raise ValueError("there is no adapter here: give one with --adapter")
    for row in weights.table.values():
        if not is_adapter(row.name):
            continue
        header = Header(row.shape, dtype or adapter.header(row.name).dtype)

        def read(name: str = row.name, dtype: torch.dtype = header.dtype) -> Tensor:
            return adapter.read(name).to(dtype)

        stem = row.diffusers if diffusers else row.name
        planned.append(Planned(f"{prefix}{stem}.weight", row.name, header, read))
    return planned


def write_file(path: Path, planned: Sequence[Planned], note: dict[str, str] | None = None) -> None:
    """A safetensors file, written one tensor at a time. Wide types first, so that all align."""
    ordered = sorted(planned, key=lambda p: -p.header.dtype.itemsize)
    ends = list(itertools.accumulate((p.header.nbytes for p in ordered), initial=0))
    names = {dtype: name for name, dtype in DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(note or {})}}
    for p, (start, end) in zip(ordered, itertools.pairwise(ends), strict=True):
        table[p.name] = {"dtype": names[p.header.dtype], "shape": list(p.header.shape),
                         "data_offsets": [start, end]}  # fmt: skip
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for p in ordered:
            file.write(p.read().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_model(folder: Path, planned: Sequence[Planned], limit: int, config: object) -> None:
    """A model's folder: config.json and one file, or several of `limit` bytes and their index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    parts: list[list[Planned]] = [[]]
    for p in planned:
        if parts[-1] and sum(q.header.nbytes for q in parts[-1]) + p.header.nbytes > limit:
            parts.append([])
        parts[-1].append(p)
    if len(parts) == 1:
        write_file(folder / MODEL_FILE, planned)
        return
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = MODEL_FILE.replace(".", f"-{number:05d}-of-{len(parts):05d}.")
        write_file(folder / name, part)
        where |= {p.name: name for p in part}
    total = sum(p.header.nbytes for p in planned)
    (folder / f"{MODEL_FILE}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
    )


def diffusers_config(sizes: Sizes, heads: int) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": version("diffusers"),
        "patch_size": list(sizes.patch), "num_attention_heads": heads,
        "attention_head_dim": sizes.hidden // heads, "in_channels": sizes.channels,
        "out_channels": sizes.channels, "text_dim": sizes.text, "freq_dim": sizes.sinusoid,
        "ffn_dim": sizes.ffn, "num_layers": sizes.layers, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": EPS, "image_dim": None,
        "added_kv_proj_dim": None, "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
    }  # fmt: skip


def original_config(sizes: Sizes, heads: int) -> dict[str, Any]:
    """config.json of Wan's own WanModel."""
    return {
        "_class_name": "WanModel", "_diffusers_version": version("diffusers"),
        "model_type": "t2v", "patch_size": list(sizes.patch), "text_len": 512,
        "in_dim": sizes.channels, "dim": sizes.hidden, "ffn_dim": sizes.ffn,
        "freq_dim": sizes.sinusoid, "text_dim": sizes.text, "out_dim": sizes.channels,
        "num_heads": heads, "num_layers": sizes.layers, "eps": EPS,
    }  # fmt: skip


TARGET_MODULES: dict[Keys, tuple[str, ...]] = {
    "original": ("q", "k", "v", "o", "ffn.0", "ffn.2"),
    "diffusers": ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
}
"""Ends of the names of the 10 linear layers of a block, for PEFT."""


def write_peft(
    folder: Path, plan: Callable[[str], list[Planned]], rank: int, alpha: float, keys: Keys
) -> list[Planned]:
    """An adapter folder as PEFT writes it, of the tensors that `plan` names with a prefix.

    With diffusers' names also the file that load_lora_weights looks for.
    """
    from peft import LoraConfig

    planned = plan("base_model.model.")
    folder.mkdir(parents=True)
    LoraConfig(
        r=rank, lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=list(TARGET_MODULES[keys]), lora_dropout=0.0, bias="none",
        inference_mode=True,
    ).save_pretrained(str(folder))  # fmt: skip
    write_file(folder / ADAPTER_FILE, planned)
    if keys == "diffusers":
        twin = plan("transformer.")
        write_file(folder / LORA_FILE, twin, _lora_note(twin, rank, alpha))
    return planned


def _lora_note(planned: Sequence[Planned], rank: int, alpha: float) -> dict[str, str]:
    """What diffusers' load_lora_weights needs beside the tensors, or it would take alpha = rank."""
    modules = sorted({p.name.removeprefix("transformer.").split(".lora_")[0] for p in planned})
    note = {"r": rank, "lora_alpha": alpha, "target_modules": modules}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in note.items()})}


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What to write."""

    to: Target
    keys: Keys | None = None
    """Names in a `peft` folder (diffusers if None) or in `merged` weights (original if None)."""

    dtype: torch.dtype | None = None
    """None keeps each tensor's own."""

    shard_bytes: int = 5 * 10**9
    """Largest file of a model's folder."""

    part: Literal["base", "adapter"] | None = None
    """Of `comfyui`: which of the two to write; None is the base if there is one."""

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[str | None, ...]] = {
            "peft": (None, "original", "diffusers"), "merged": (None, *get_args(Keys)),
        }  # fmt: skip
        if self.keys not in allowed.get(self.to, (None, self.to)):
            raise ValueError(f"--to {self.to} cannot be written with --keys {self.keys}")


def export(weights: Weights, out: Path, order: Order, prove: Callable[[Path], None]) -> int:
    """Write `weights` to `out`, prove every tensor's bits, let `prove` see it, then publish it.

    Args:
        weights: what there is.
        out: file (x.safetensors: original, comfyui, merged) or folder to make.
        order: what of it to write, and how.
        prove: raises if the result at the path it is given is not right.

    Returns:
        Tensors written.

    Raises:
        ValueError: `out` exists, a needed part is not there, or what was written reads back
            otherwise.
    """
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another name")
    single = out.suffix == ".safetensors"
    partial = out.with_name(f".partial-{out.name}")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        planned = _write(weights, partial, order, single=single)
        _prove_bits(partial, planned, weights.alpha)
        if order.to == "peft" and (partial / LORA_FILE).is_file():
            _prove_bits(partial / LORA_FILE, planned, weights.alpha)
        prove(partial)
        partial.rename(out)
    finally:
        _remove(partial)
    return len(planned)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _write(weights: Weights, path: Path, order: Order, *, single: bool) -> list[Planned]:
    if order.to == "peft":
        return _write_adapter(weights, path, order, single=single)
    if order.to == "comfyui" and (order.part == "adapter" or weights.base is None):
        return _write_comfyui_adapter(weights, path, order, single=single)
    keys = order.keys or "original"
    if order.to == "diffusers" or order.to == "comfyui":
        keys = order.to
    if order.to == "merged" and weights.adapter is None:
        raise ValueError("nothing to merge: give an adapter with --adapter")
    planned = plan_base(weights, keys, order.dtype, merge=order.to == "merged")
    if single and keys != "diffusers":
        write_file(path, planned)
    elif single or keys == "comfyui":
        raise ValueError("ComfyUI's keys go to one x.safetensors file, diffusers' to a folder")
    else:
        assert weights.heads is not None
        config = diffusers_config if keys == "diffusers" else original_config
        write_model(path, planned, order.shard_bytes, config(weights.sizes, weights.heads))
    return planned


def _write_adapter(weights: Weights, path: Path, order: Order, *, single: bool) -> list[Planned]:
    if single:
        raise ValueError("a PEFT adapter is a folder: give a name without .safetensors")
    keys: Keys = order.keys or "diffusers"

    def plan(prefix: str) -> list[Planned]:
        return plan_adapter(weights, prefix, order.dtype, diffusers=keys == "diffusers")

    return write_peft(path, plan, weights.sizes.rank, weights.alpha, keys)


def _write_comfyui_adapter(
    weights: Weights, path: Path, order: Order, *, single: bool
) -> list[Planned]:
    if not single:
        raise ValueError("ComfyUI reads one file: give a name that ends in .safetensors")
    planned = plan_adapter(weights, "diffusion_model.", order.dtype, diffusers=False)
    alpha = torch.tensor(weights.alpha)
    alphas = [
        Planned(f"{p.name.split('.lora_')[0]}.alpha", "", Header((), alpha.dtype), alpha.clone)
        for p in planned
        if p.own.endswith(".lora_A")
    ]
    write_file(path, [*planned, *alphas])
    return planned


def _prove_bits(path: Path, planned: Sequence[Planned], alpha: float) -> None:
    """Read the result back and compare it with its source."""
    found = open_checkpoint(path)
    wanted = {p.own: p for p in planned}
    if found.foreign or found.stored.keys() != wanted.keys():
        raise ValueError(
            f"{path} reads back with other tensors than were written: "
            f"{sorted(found.stored.keys() ^ wanted.keys())[:3]}, {found.foreign[:3]}"
        )
    if found.has_adapter and found.alpha != alpha:
        raise ValueError(f"{path} reads back with alpha {found.alpha}, {alpha} was written")
    for name, p in wanted.items():
        if not same_bits(p.read(), found.read(name)):
            raise ValueError(f"{path}: {name} reads back with other bits than were written")
