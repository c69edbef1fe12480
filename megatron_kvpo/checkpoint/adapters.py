"""Adapters of a model to and from PEFT's format, and into the base and out again."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_kvpo.checkpoint.convert import cut_like
from megatron_kvpo.checkpoint.export import Keys, Planned, write_peft
from megatron_kvpo.checkpoint.formats import ADAPTER_CONFIG, Checkpoint, open_checkpoint
from megatron_kvpo.checkpoint.mapping import check_fit, diffusers_name, is_adapter
from megatron_kvpo.checkpoint.stores import Header
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import SLOTS, Adapter, adapters_of
from megatron_kvpo.model.weights import whole_shape, whole_value


def _adapters(model: CausalWan) -> dict[str, Adapter]:
    """Adapters by the name of their layer. ValueError if the model has none."""
    return {name.removesuffix(".adapter"): a for name, a in adapters_of(model).items()}


def _halves(model: CausalWan, slot: str) -> Iterator[tuple[str, nn.Parameter]]:
    """A and B of every layer, by our names. ValueError for an unknown slot."""
    if slot not in SLOTS:
        raise ValueError(f"no adapter slot {slot!r}: there are {SLOTS}")
    for name, adapter in _adapters(model).items():
        yield f"{name}.lora_A", adapter.lora_A[slot]
        yield f"{name}.lora_B", adapter.lora_B[slot]


def _rank_and_alpha(model: CausalWan) -> tuple[int, float]:
    adapter = next(iter(_adapters(model).values()))
    rank = adapter.lora_A[SLOTS[0]].shape[0]
    return rank, adapter.scale * rank


def save_adapter(model: CausalWan, slot: str, folder: Path, keys: Keys = "diffusers") -> None:
    """Write one slot as a PEFT adapter folder. Collective; the first rank writes.

    Args:
        model: built with adapters.
        slot: which of the four.
        folder: to make; an adapter that lies there already is replaced.
        keys: names of the layers in it. `diffusers`: PeftModel.from_pretrained on diffusers'
            WanTransformer3DModel reads it, and a pipeline's load_lora_weights. `original`: the same
            on Wan's own model, or LongLive's.

    Raises:
        ValueError: no such slot, no adapters, or `folder` holds something else.
    """
    axis, rank_alpha = model.spec.ranks.tensor, _rank_and_alpha(model)
    if folder.exists() and not (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{folder} exists and is no adapter: choose another folder")
    whole = {name: whole_value(p, axis).cpu() for name, p in _halves(model, slot)}
    if model.spec.ranks.rank == 0:
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        write_peft(partial, lambda prefix: _planned(whole, prefix, keys), *rank_alpha, keys)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _planned(whole: Mapping[str, Tensor], prefix: str, keys: Keys) -> list[Planned]:
    return [
        Planned(
            f"{prefix}{diffusers_name(name) if keys == 'diffusers' else name}.weight",
            name, Header(tuple(value.shape), value.dtype), functools.partial(_same, value),
        )
        for name, value in whole.items()
    ]  # fmt: skip


def _same(value: Tensor) -> Tensor:
    return value


@torch.no_grad()
def load_adapter(
    model: CausalWan, path: Path, slots: Sequence[str] = SLOTS, *, key: str | None = None
) -> None:
    """Fill slots from a saved adapter. Each rank reads its share; no communication.

    Args:
        model: built with adapters of the same rank and alpha.
        path: PEFT folder, LongLive's or MemFlow's lora.pt, a LoRA file of diffusers or ComfyUI, or
            a checkpoint of ours.
        slots: filled alike.
        key: part of a .pt file; see `open_checkpoint`.

    Raises:
        ValueError: rank or alpha differ from the model's (a .pt file does not say its alpha, and
            none is checked), or tensors are missing, foreign or misshapen. The model is unchanged.
    """
    checkpoint = open_checkpoint(path, key=key)
    own = {slot: dict(_halves(model, slot)) for slot in slots}
    _check_rank_and_alpha(checkpoint, *_rank_and_alpha(model))
    axis = model.spec.ranks.tensor
    found = {name: shape for name, shape in checkpoint.shapes.items() if is_adapter(name)}
    for halves in own.values():
        wanted = {name: tuple(whole_shape(p, axis)) for name, p in halves.items()}
        check_fit(found, wanted, str(path), checkpoint.foreign)
    for name, like in own[slots[0]].items():
        value = checkpoint.read(name, cut_like(like, axis))
        for halves in own.values():
            halves[name].copy_(value)


def _check_rank_and_alpha(checkpoint: Checkpoint, rank: int, alpha: float) -> None:
    ranks = {s[0] for name, s in checkpoint.shapes.items() if name.endswith(".lora_A") and s}
    if not ranks:
        raise ValueError(f"{checkpoint.path} holds no adapter: no tensor there is a LoRA's")
    if ranks != {rank}:
        raise ValueError(
            f"{checkpoint.path} has rank {sorted(ranks)}, policy.lora_rank is {rank}: set it to "
            "the adapter's"
        )
    if checkpoint.alpha is not None and abs(checkpoint.alpha - alpha) > 1e-6 * alpha:
        raise ValueError(
            f"{checkpoint.path} has alpha {checkpoint.alpha:g}, policy.lora_alpha is {alpha:g}: "
            "set it to the adapter's"
        )


@torch.no_grad()
def merge_adapter(model: CausalWan, slot: str) -> dict[str, Tensor]:
    """W <- W + scale B A in every adapted layer, in float32, then W's type. No communication.

    Call the model without a slot afterwards, or the adapter acts twice. Returns the weights as they
    were, by name, for `unmerge_adapter`: as much memory as the adapted layers take.
    """
    halves, kept = dict(_halves(model, slot)), {}
    for name, adapter in _adapters(model).items():
        weight = model.get_parameter(f"{name}.weight")
        kept[f"{name}.weight"] = weight.detach().clone()
        up, down = (halves[f"{name}.lora_{half}"].float() for half in "BA")
        weight.copy_(torch.addmm(weight.float(), up, down, alpha=adapter.scale))
    return kept


@torch.no_grad()
def unmerge_adapter(model: CausalWan, kept: Mapping[str, Tensor]) -> None:
    """Undo `merge_adapter`, bit for bit."""
    for name, value in kept.items():
        model.get_parameter(name).copy_(value)
