"""Names, shapes and cuts of Wan's tensors, as a table. Our names are those of the released weights.

    released and ours                    diffusers
    blocks.3.self_attn.q.weight          blocks.3.attn1.to_q.weight
    blocks.3.self_attn.q.lora_A          blocks.3.attn1.to_q.lora_A      (files append .weight)

Dimensions are letters: D hidden, F feed-forward, X text, S sinusoid, C latent channels, p h w the
patch, O channels of an output patch, R rank of the adapter.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_kvpo.method_config import BACKBONES

Split = Literal["whole", "rows", "columns"]
"""How tensor ranks share a tensor: not at all, along dim 0 or along dim 1."""

CUT_DIM: dict[Split, int | None] = {"whole": None, "rows": 0, "columns": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor under both names, its layout and its dimensions. `{i}` is the layer number."""

    name: str
    diffusers: str
    split: Split
    dims: tuple[str, ...]


def _linear(name: str, diffusers: str, split: Split, out: str, inner: str) -> tuple[Entry, Entry]:
    bias: Split = "rows" if split == "rows" else "whole"
    return (
        Entry(f"{name}.weight", f"{diffusers}.weight", split, (out, inner)),
        Entry(f"{name}.bias", f"{diffusers}.bias", bias, (out,)),
    )


def _attention(name: str, diffusers: str) -> tuple[Entry, ...]:
    own, other = f"blocks.{{i}}.{name}", f"blocks.{{i}}.{diffusers}"
    return (
        *_linear(f"{own}.q", f"{other}.to_q", "rows", "D", "D"),
        *_linear(f"{own}.k", f"{other}.to_k", "rows", "D", "D"),
        *_linear(f"{own}.v", f"{other}.to_v", "rows", "D", "D"),
        *_linear(f"{own}.o", f"{other}.to_out.0", "columns", "D", "D"),
        Entry(f"{own}.norm_q.weight", f"{other}.norm_q.weight", "rows", ("D",)),
        Entry(f"{own}.norm_k.weight", f"{other}.norm_k.weight", "rows", ("D",)),
    )


_TEXT, _TIME = "condition_embedder.text_embedder", "condition_embedder.time_embedder"

OUTSIDE: tuple[Entry, ...] = (
    Entry("patch_embedding.weight", "patch_embedding.weight", "whole", ("D", "C", "p", "h", "w")),
    Entry("patch_embedding.bias", "patch_embedding.bias", "whole", ("D",)),
    *_linear("text_embedding.0", f"{_TEXT}.linear_1", "whole", "D", "X"),
    *_linear("text_embedding.2", f"{_TEXT}.linear_2", "whole", "D", "D"),
    *_linear("time_embedding.0", f"{_TIME}.linear_1", "whole", "D", "S"),
    *_linear("time_embedding.2", f"{_TIME}.linear_2", "whole", "D", "D"),
    *_linear("time_projection.1", "condition_embedder.time_proj", "whole", "6D", "D"),
    *_linear("head.head", "proj_out", "whole", "O", "D"),
    Entry("head.modulation", "scale_shift_table", "whole", ("1", "2", "D")),
)
"""The 15 tensors that are not of a layer."""

LAYER: tuple[Entry, ...] = (
    Entry("blocks.{i}.modulation", "blocks.{i}.scale_shift_table", "whole", ("1", "6", "D")),
    *_attention("self_attn", "attn1"),
    Entry("blocks.{i}.norm3.weight", "blocks.{i}.norm2.weight", "whole", ("D",)),
    Entry("blocks.{i}.norm3.bias", "blocks.{i}.norm2.bias", "whole", ("D",)),
    *_attention("cross_attn", "attn2"),
    *_linear("blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj", "rows", "F", "D"),
    *_linear("blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2", "columns", "D", "F"),
)
"""The 27 tensors of each layer."""


def _adapter(entry: Entry) -> tuple[Entry, Entry]:
    """A and B of a linear layer. One of them is cut as the layer is, the other is whole."""
    name, diffusers = (n.removesuffix(".weight") for n in (entry.name, entry.diffusers))
    out, inner = entry.dims
    a: Split = "columns" if entry.split == "columns" else "whole"
    b: Split = "rows" if entry.split == "rows" else "whole"
    return (
        Entry(f"{name}.lora_A", f"{diffusers}.lora_A", a, ("R", inner)),
        Entry(f"{name}.lora_B", f"{diffusers}.lora_B", b, (out, "R")),
    )


ADAPTER: tuple[Entry, ...] = tuple(
    half for entry in LAYER if len(entry.dims) == 2 for half in _adapter(entry)
)
"""A and B of the 10 linear layers of each layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the shapes of a model's tensors follow from."""

    hidden: int
    ffn: int
    layers: int
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text: int = 4096
    sinusoid: int = 256
    rank: int = 0
    """Of the adapter; 0 without one."""

    def dim(self, letter: str) -> int:
        """The size that a letter of the table stands for."""
        p, h, w = self.patch
        known = {
            "D": self.hidden, "F": self.ffn, "X": self.text, "S": self.sinusoid, "R": self.rank,
            "C": self.channels, "p": p, "h": h, "w": w, "6D": 6 * self.hidden,
            "O": self.channels * p * h * w,
        }  # fmt: skip
        return known.get(letter) or int(letter)


PRESETS: dict[str, Sizes] = {
    name: Sizes(hidden=b["hidden_dim"], ffn=b["ffn_dim"], layers=b["num_layers"])
    for name, b in BACKBONES.items()
}


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of one model."""

    name: str
    diffusers: str
    split: Split
    shape: tuple[int, ...]

    def share(self, rank: int, size: int) -> tuple[int, int, int] | None:
        """(dim, start, stop) of what tensor rank `rank` of `size` holds; None is all of it."""
        dim = CUT_DIM[self.split]
        if dim is None or size == 1:
            return None
        if self.shape[dim] % size:
            raise ValueError(
                f"{self.name} {list(self.shape)} does not divide by {size} tensor ranks along "
                f"dim {dim}: use fewer"
            )
        count = self.shape[dim] // size
        return dim, rank * count, (rank + 1) * count


def _expand(entries: tuple[Entry, ...], sizes: Sizes, layer: int = 0) -> dict[str, Row]:
    rows = (
        Row(e.name.format(i=layer), e.diffusers.format(i=layer), e.split,
            tuple(sizes.dim(letter) for letter in e.dims))
        for e in entries
    )  # fmt: skip
    return {row.name: row for row in rows}


def base_table(sizes: Sizes) -> dict[str, Row]:
    """Every tensor of the model without adapter, by released name: 27 a layer and 15."""
    table = _expand(OUTSIDE, sizes)
    for layer in range(sizes.layers):
        table |= _expand(LAYER, sizes, layer)
    return table


def adapter_table(sizes: Sizes) -> dict[str, Row]:
    """Every tensor of an adapter of rank `sizes.rank`: 20 a layer."""
    table: dict[str, Row] = {}
    for layer in range(sizes.layers):
        table |= _expand(ADAPTER, sizes, layer)
    return table


_ENTRIES = {entry.name: entry for entry in (*OUTSIDE, *LAYER, *ADAPTER)}
_RELEASED = {e.diffusers: e.name for e in _ENTRIES.values()} | {name: name for name in _ENTRIES}
_NUMBER = re.compile(r"^blocks\.(\d+)\.")
_HALF = re.compile(
    r"^(?P<module>.+)\.lora_(?P<half>A|B|down|up)(?:\.(?!weight$)[^.]+)?(?:\.weight)?$"
)
_HALVES = {"A": "A", "B": "B", "down": "A", "up": "B"}


def released_name(bare: str) -> str | None:
    """Our name of a tensor known by any of its names, without wrappers; None if it is foreign.

    Adapters: `<module>.lora_A.weight`, `.lora_A.<adapter>.weight`, `.lora_down.weight` and the
    like all are `<module>.lora_A` here.
    """
    half = _HALF.match(bare)
    if half is not None:
        bare = f"{half['module']}.lora_{_HALVES[half['half']]}"
    number = _NUMBER.match(bare)
    name = _RELEASED.get(_NUMBER.sub("blocks.{i}.", bare))
    return name.format(i=number[1]) if name is not None and number is not None else name


def diffusers_name(name: str) -> str:
    """What diffusers calls a tensor of ours."""
    number = _NUMBER.match(name)
    entry = _ENTRIES[_NUMBER.sub("blocks.{i}.", name)]
    return entry.diffusers.format(i=number[1]) if number is not None else entry.diffusers


def is_adapter(name: str) -> bool:
    """Whether a tensor of ours is half of an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def sizes_of(shapes: Mapping[str, tuple[int, ...]], layers: int | None = None) -> Sizes:
    """Sizes that most of these tensors agree on, so that a misshapen one stands out.

    Args:
        shapes: by released name.
        layers: how many there must be; None counts them, unless hidden and feed-forward size are
            those of a preset, which then says how many.
    """
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    numbers = {-1}
    for name, shape in shapes.items():
        number = _NUMBER.match(name)
        if number is not None:
            numbers.add(int(number[1]))
        entry = _ENTRIES[_NUMBER.sub("blocks.{i}.", name)]
        if len(shape) == len(entry.dims):
            for letter, size in zip(entry.dims, shape, strict=True):
                votes[letter][size] += 1
    most = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    if "D" not in most:
        raise ValueError("no tensor here is one of a Wan model: its sizes cannot be told")
    hidden, ffn = most["D"], most.get("F", 0)
    if layers is None:
        known = [p.layers for p in PRESETS.values() if (p.hidden, p.ffn) == (hidden, ffn)]
        layers = known[0] if known else max(numbers) + 1
    return Sizes(
        hidden=hidden, ffn=ffn, layers=layers, channels=most.get("C", 16),
        patch=(most.get("p", 1), most.get("h", 2), most.get("w", 2)), text=most.get("X", 4096),
        sinusoid=most.get("S", 256), rank=most.get("R", 0),
    )  # fmt: skip


def check_fit(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], source: str,
    foreign: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """ValueError naming the tensors that are missing, misshapen or not of the model."""
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted({*foreign, *(found.keys() - wanted.keys())})
    if missing or unknown:
        raise ValueError(
            f"{source}: of the {len(wanted)} tensors of the model {len(missing)} are missing "
            f"(first: {missing[:3]}) and {len(unknown)} others are there (first: {unknown[:3]}); "
            "check that it is the right file and the right size of model"
        )
    bad = [name for name in wanted if tuple(found[name]) != tuple(wanted[name])]
    if bad:
        name = bad[0]
        raise ValueError(
            f"{source}: {name} is {list(found[name])}, the model needs {list(wanted[name])} "
            f"({len(bad)} misshapen tensors in all)"
        )
