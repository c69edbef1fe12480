"""Frozen modules: how their weights are read, filled in, and kept off the device while idle.

Safetensors, or `torch.load(weights_only=True)`: no file that is read here can run code.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


@contextmanager
def resident(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Hold a frozen module's weights on `device` inside the block; nests.

    The copies it came from stay where they are and serve again at the end, so leaving costs
    nothing, and weights that are mapped from a file stay mapped.
    """
    held = [(t, t.data) for t in itertools.chain(module.parameters(), module.buffers())]
    try:
        for tensor, data in held:
            tensor.data = data.to(device)
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def fill(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, source: Path
) -> None:
    """Give a module (built on the meta device) its weights, cast to `dtype`, and freeze it.

    Raises ValueError with names for unknown, missing or misshapen tensors.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found: dict[str, Tensor] = {}
    unknown, wrong = [], []
    for name, tensor in tensors:
        if name not in wanted:
            unknown.append(name)
        elif tensor.shape != wanted[name]:
            wrong.append(f"{name} {list(tensor.shape)} instead of {list(wanted[name])}")
        else:
            found[name] = tensor.to(dtype)
    missing = sorted(wanted.keys() - found.keys()) if not wrong else []
    if unknown or missing or wrong:
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {len(unknown)} unknown tensors "
            f"{sorted(unknown)[:3]}, {len(missing)} missing {missing[:3]}, {len(wrong)} of another "
            f"size {wrong[:3]}"
        )
    module.load_state_dict(found, assign=True)
    module.requires_grad_(False).eval()


def read_safetensors(paths: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, one at a time. ValueError for what is not safetensors."""
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error


def indexed_files(index: Path) -> tuple[Path, ...]:
    """The files that a `*.safetensors.index.json` names, beside it, each once."""
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return tuple(index.parent / name for name in sorted(set(names)))


def open_pickle(path: Path) -> Any:
    """What a file of torch.save holds, its tensors mapped from disk, not copied.

    Raises ValueError for a file that is damaged or that would run code when it is unpickled.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and could run code when opened "
            f"({str(error).splitlines()[0]}). Have its maker save the state dict alone, or as "
            "safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: {str(error).splitlines()[0]}. It is cut short, or of torch's "
            "format before 1.6: fetch it again or save it anew"
        ) from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A `.pth` state dict, mapped. ValueError as `open_pickle`, and for more than tensors."""
    state = open_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} is no state dict: tensors by name are needed")
    return state
