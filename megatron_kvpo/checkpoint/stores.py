"""Tensors in files of three kinds, read one at a time: safetensors, torch.save's, and ours.

A tensor is copied out of a mapped file, which is closed again: what is resident is what was asked
for. Pickles are read by torch.load(weights_only=True) alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as read_tensors

from megatron_kvpo.checkpoint import state
from megatron_kvpo.model.frozen import open_pickle

Cut = tuple[int, int, int] | None
"""(dim, start, stop) of a tensor's part; None is the whole."""

_SECTIONS = ("generator_ema", "generator", "generator_lora", "model", "state_dict")
"""Where trainers put the generator in a .pt file; the first of them is read."""

_COMMON_KEY = "common_state"
"""Before the slash of its name where megatron-core 0.19 keeps what is no tensor."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.numel * self.dtype.itemsize


class Store(Protocol):
    """Tensors of a checkpoint under the names they were saved by."""

    headers: dict[str, Header]

    def read(self, name: str, cut: Cut = None) -> Tensor:
        """A tensor, or a part of it, in memory of its own."""
        ...


def _own(mapped: Tensor, cut: Cut) -> Tensor:
    part = mapped if cut is None else mapped.narrow(cut[0], cut[1], cut[2] - cut[1])
    return part.clone(memory_format=torch.contiguous_format)


class SafetensorsStore:
    """One safetensors file or several."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.headers: dict[str, Header] = {}
        self.metadata: dict[str, str] = {}
        self._file: dict[str, Path] = {}
        for path in files:
            with _safe_open(path) as file:
                self.metadata |= file.metadata() or {}
                for name in file.keys():  # noqa: SIM118
                    if name in self._file:
                        raise ValueError(f"{name} is in {self._file[name]} and again in {path}")
                    part = file.get_slice(name)
                    self._file[name] = path
                    self.headers[name] = Header(tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def read(self, name: str, cut: Cut = None) -> Tensor:
        """See Store. Opens the file anew, so that mapped pages do not pile up."""
        with _safe_open(self._file[name]) as file:
            return _own(file.get_tensor(name), cut)


def _safe_open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no file at {path}: give the path of a checkpoint")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


class PickleStore:
    """A file of torch.save, mapped."""

    def __init__(self, path: Path, key: str | None) -> None:
        self._path, self._key = path, key
        self._tensors = self._open()
        self.headers = {n: Header(tuple(t.shape), t.dtype) for n, t in self._tensors.items()}
        self._limit = max((header.nbytes for header in self.headers.values()), default=0)
        self._touched = 0

    def _open(self) -> dict[str, Tensor]:
        tensors, self._key = _section(open_pickle(self._path), self._key, self._path)
        return tensors

    @property
    def section(self) -> str:
        """Key of the part of the file that is read; empty if the tensors lie at its top."""
        return self._key or ""

    def read(self, name: str, cut: Cut = None) -> Tensor:
        """See Store. Maps the file anew once the largest tensor's worth of it was read."""
        size = self.headers[name].nbytes
        if self._touched + size > self._limit:
            self._tensors.clear()
            self._tensors, self._touched = self._open(), 0
        self._touched += size
        return _own(self._tensors[name], cut)


def _section(content: Any, key: str | None, path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a loaded file and the key it was found under."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    parts = {k: v for k, v in content.items() if isinstance(v, Mapping) and _tensors(v)}
    if key is None:
        key = next((k for k in _SECTIONS if k in parts), "")
    if key and key not in parts:
        raise ValueError(f"{path} has no part {key!r} with tensors: there are {sorted(parts)}")
    tensors = _tensors(parts[key] if key else content)
    if not tensors:
        raise ValueError(
            f"{path} has no part among {list(_SECTIONS)} and no tensors at its top: name one of "
            f"{sorted(parts)} with --key"
        )
    return tensors, key


def _tensors(mapping: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(k): v for k, v in mapping.items() if isinstance(v, Tensor)}


class _Reader(FileSystemReader):
    """Reads the table of tensors once: unpickling it anew for each tensor takes far longer."""

    _table: Metadata | None = None

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        if self._table is None:
            self._table = super().read_metadata(*arguments, **options)
        return self._table


class _Bytes(DefaultLoadPlanner):
    """Leaves what is no tensor as it was written: torch's own planner would unpickle anything."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, io.BytesIO] = {}

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.read[read_item.dest_index.fqn] = value


class DistributedStore:
    """A checkpoint of ours, read by one process."""

    def __init__(self, path: Path) -> None:
        state.check_whole(path)
        self._reader = _Reader(path)
        table = self._reader.read_metadata().state_dict_metadata
        self.headers = {
            name: Header(tuple(entry.size), entry.properties.dtype)
            for name, entry in table.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.common = self._common(path, table)
        """What the checkpoint holds besides."""

    def _common(self, path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
        """From a file of its own (megatron-core 0.16) or from among the tensors (0.19)."""
        if (path / state.COMMON_FILE).is_file():
            alone: dict[str, Any] = torch.load(path / state.COMMON_FILE, weights_only=True)
            return alone
        name = next((name for name in table if name.split("/")[0] == _COMMON_KEY), None)
        if name is None:
            return {}
        planner = _Bytes()
        read_tensors({name: io.BytesIO()}, storage_reader=self._reader, planner=planner,
                     no_dist=True)  # fmt: skip
        (found,) = torch.load(planner.read[name], weights_only=True)
        among: dict[str, Any] = found
        return among

    def read(self, name: str, cut: Cut = None) -> Tensor:
        """See Store. Reads the whole tensor's file parts first."""
        header = self.headers[name]
        target = {name: torch.empty(header.shape, dtype=header.dtype)}
        read_tensors(target, storage_reader=self._reader, no_dist=True)
        return target[name] if cut is None else _own(target[name], cut)
