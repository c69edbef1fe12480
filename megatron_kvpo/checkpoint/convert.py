"""A checkpoint of any form into ours or into a model, and two of any forms compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_kvpo import log
from megatron_kvpo.checkpoint import state
from megatron_kvpo.checkpoint.formats import Checkpoint, open_checkpoint
from megatron_kvpo.checkpoint.mapping import (
    CUT_DIM,
    Row,
    Sizes,
    adapter_table,
    base_table,
    check_fit,
    is_adapter,
    sizes_of,
)
from megatron_kvpo.checkpoint.stores import Cut
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import mark_sharded, partition_of
from megatron_kvpo.model.weights import base_parameters, whole_shape
from megatron_kvpo.parallel.groups import Axis, Ranks

logger = log.get_logger(__name__)

_HEAD_DIM = 128
"""Of every released Wan model."""


def checked(checkpoint: Checkpoint, layers: int | None = None) -> tuple[Sizes, dict[str, Row]]:
    """Sizes of a checkpoint and the table of what it holds: the model, an adapter, or both.

    `layers`: how many there must be; None asks its config.json, then the presets, then counts.
    ValueError names a tensor that is missing, foreign or misshapen.
    """
    if not checkpoint.stored:
        raise ValueError(
            f"{checkpoint.path} holds no tensor of a Wan model: its first names are "
            f"{list(checkpoint.foreign[:3])}"
        )
    sizes = sizes_of(checkpoint.shapes, layers or checkpoint.layers)
    table = base_table(sizes) if checkpoint.has_base else {}
    if checkpoint.has_adapter:
        table |= adapter_table(sizes)
    wanted = {name: row.shape for name, row in table.items()}
    check_fit(checkpoint.shapes, wanted, str(checkpoint.path), checkpoint.foreign)
    return sizes, table


def heads_of(checkpoint: Checkpoint, sizes: Sizes, heads: int | None = None) -> int:
    """Attention heads: as given, as its folder says, or of size 128. ValueError if untold."""
    found = heads or checkpoint.heads
    if found is None and sizes.hidden % _HEAD_DIM == 0:
        found = sizes.hidden // _HEAD_DIM
    if found is None or sizes.hidden % found:
        raise ValueError(
            f"{checkpoint.path}: hidden size {sizes.hidden} does not divide into "
            f"{found or 'heads of 128'}: say how many heads there are with --heads"
        )
    return found


def import_checkpoint(
    sources: Sequence[Checkpoint], out: Path, ranks: Ranks, *, dtype: torch.dtype | None = None,
    alpha: float | None = None, heads: int | None = None, layers: int | None = None,
) -> Path:  # fmt: skip
    """Write a base, an adapter or both as a checkpoint of ours, step 0 in `out`. Collective.

    Each tensor rank reads its share of each tensor and nothing else; what the ranks hold at the end
    is one model. Any layout can load what any layout wrote.

    Args:
        sources: at most one with a base, at most one with an adapter.
        out: folder for the checkpoint.
        ranks: who reads and writes.
        dtype: of the written tensors; None keeps each tensor's own.
        alpha: of the adapter, if its file does not say; None then takes the rank.
        heads: attention heads, if no config says.
        layers: see `checked`.

    Returns:
        The checkpoint, out/step_00000000.

    Raises:
        ValueError: a source is incomplete, or two hold the same tensors or differ in size.
    """
    axis, shares = ranks.tensor, dict[str, Tensor]()
    facts: dict[str, Any] = {}
    seen: Sizes | None = None
    for source in sources:
        sizes, table = checked(source, layers)
        facts |= _facts(source, sizes, alpha, heads)
        check_same_model(seen, sizes, source)
        seen = sizes
        for name, row in table.items():
            if _key(name) in shares:
                raise ValueError(f"{name} is in more than one source, {source.path} the last")
            part = source.read(name, row.share(axis.rank, axis.size))
            share = nn.Parameter(part if dtype is None else part.to(dtype), requires_grad=False)
            dim = CUT_DIM[row.split]
            if dim is not None:
                mark_sharded(share, dim)
            shares[_key(name)] = share
    tree = {"model": state.shard_parameters(shares, ranks), "weights": facts}
    return state.save(out, 0, tree, ranks, keep=1)


def _key(name: str) -> str:
    """Name of a tensor in our checkpoints, where an adapter lies in a slot."""
    if not is_adapter(name):
        return name
    module, _, half = name.rpartition(".")
    return f"{module}.adapter.{half}.current"


def _facts(
    source: Checkpoint, sizes: Sizes, alpha: float | None, heads: int | None
) -> dict[str, Any]:
    """What the tensors do not tell, kept beside them."""
    facts: dict[str, Any] = {"layers": sizes.layers}
    if source.has_base:
        facts["heads"] = heads_of(source, sizes, heads)
    if source.has_adapter:
        facts["alpha"] = alpha_of(source, sizes, alpha)
    return facts


def alpha_of(source: Checkpoint, sizes: Sizes, alpha: float | None = None) -> float:
    """Alpha of an adapter: what its file says, else as given, else its rank (scale 1).

    ValueError if the file says something else than is given.
    """
    if source.alpha is not None and alpha not in (None, source.alpha):
        raise ValueError(f"{source.path} has alpha {source.alpha:g}, {alpha:g} was asked for")
    return float(source.alpha or alpha or sizes.rank)


def check_same_model(one: Sizes | None, other: Sizes, source: Checkpoint) -> None:
    """ValueError unless the sizes that a base and an adapter share are equal."""
    if one is None:
        return
    for name in ("hidden", "ffn", "layers"):
        ours, theirs = getattr(one, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(
                f"{source.path} is of another model: {name} {theirs}, the one before has {ours}"
            )


@torch.no_grad()
def load_base(
    model: CausalWan, path: Path, *, key: str | None = None, slot: str = "current"
) -> None:
    """Fill this rank's share of a model's base from a checkpoint of any form. No communication.

    One tensor at a time; an adapter in the same checkpoint stays unread. ValueError names what is
    missing, foreign or misshapen, before anything is copied.
    """
    checkpoint = open_checkpoint(path, key=key, slot=slot)
    own, axis = dict(base_parameters(model)), model.spec.ranks.tensor
    found = {name: shape for name, shape in checkpoint.shapes.items() if not is_adapter(name)}
    wanted = {name: tuple(whole_shape(p, axis)) for name, p in own.items()}
    check_fit(found, wanted, str(path), checkpoint.foreign)
    heads = model.model_config.num_heads
    if checkpoint.heads not in (None, heads):
        raise ValueError(f"{path} has {checkpoint.heads} heads, model.num_heads is {heads}")
    for name, parameter in own.items():
        parameter.copy_(checkpoint.read(name, cut_like(parameter, axis)))


def cut_like(parameter: Tensor, axis: Axis) -> Cut:
    """Which part of the whole weight `parameter` is."""
    dim = partition_of(parameter)
    if dim is None or axis.size == 1:
        return None
    count = parameter.shape[dim]
    return dim, axis.rank * count, (axis.rank + 1) * count


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one type, one shape and the same bits, NaNs too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def differences(one: Checkpoint, other: Checkpoint, tolerance: float = 0.0) -> Iterator[str]:
    """One line for each tensor that is not the same in both, by released name.

    With a tolerance types may differ, and max |a - b| / max |b| may reach it.
    """
    if not one.stored and not other.stored:
        raise ValueError(f"neither {one.path} nor {other.path} holds a tensor of a Wan model")
    for checkpoint in (one, other):
        for raw in checkpoint.foreign:
            yield f"{raw} in {checkpoint.path} is no tensor of a Wan model and was not compared"
    for name in sorted(one.stored.keys() ^ other.stored.keys()):
        yield f"{name} is in {(one if name in one.stored else other).path} only"
    for name in sorted(one.stored.keys() & other.stored.keys()):
        first, second = one.header(name), other.header(name)
        if first.shape != second.shape:
            yield f"{name}: {list(first.shape)} and {list(second.shape)}"
        elif not tolerance and first.dtype != second.dtype:
            yield f"{name}: {first.dtype} and {second.dtype}"
        else:
            a, b = one.read(name), other.read(name)
            if not same_bits(a, b) and (error := relative_error(a, b)) >= tolerance:
                yield f"{name}: differs by {error:.3g} of its largest value"


def relative_error(one: Tensor, other: Tensor) -> float:
    """Largest |a - b| over largest |b|, in float32; infinite where either is not finite."""
    a, b = one.float(), other.float()
    error = (a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(error) if torch.isfinite(error) else float("inf")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is: form, counts, types, sizes. Reads no weights and refuses nothing."""
    headers = [checkpoint.header(name) for name in checkpoint.stored]
    facts: dict[str, Any] = {
        "path": str(checkpoint.path), "form": checkpoint.form, "part": checkpoint.section or None,
        "tensors": len(headers), "parameters": sum(h.numel for h in headers),
        "dtypes": sorted({str(h.dtype).removeprefix("torch.") for h in headers}),
        "foreign": list(checkpoint.foreign),
    }  # fmt: skip
    if not headers:
        return facts
    sizes = sizes_of(checkpoint.shapes, checkpoint.layers)
    facts |= {"hidden": sizes.hidden, "ffn": sizes.ffn, "layers": sizes.layers}
    if checkpoint.has_base:
        guess = sizes.hidden // _HEAD_DIM if sizes.hidden % _HEAD_DIM == 0 else None
        facts |= {"heads": checkpoint.heads or guess, "heads_told": checkpoint.heads is not None,
                  "text_dim": sizes.text, "latent_channels": sizes.channels}  # fmt: skip
    if checkpoint.has_adapter:
        facts |= {"adapter_rank": sizes.rank, "adapter_alpha": checkpoint.alpha}
    try:
        checked(checkpoint)
        facts["complete"] = True
    except ValueError as error:
        facts |= {"complete": False, "fault": str(error)}
    return facts
