"""Lets an unmodified megatron-core run on CPU ranks, without touching torch for anyone else.

Megatron-core names CUDA in four ways where the CPU would do: `device=torch.cuda.current_device()`,
`device="cuda"`, tensor types compared with "torch.cuda.FloatTensor", and CUDA's random state. Each
of its modules gets a stand-in for `torch` (and only those modules do) that answers with the CPU;
three comparisons and two functions are replaced by name. Holds for 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "randn",
    "tensor", "zeros", "zeros_like",
)  # fmt: skip


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same factory, with any CUDA device it is given read as the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


class _CpuCuda(types.ModuleType):
    """torch.cuda as megatron-core sees it: the current device is the CPU, and it never waits."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.get_rng_state = lambda device=_CPU: torch.get_rng_state()
        self.set_rng_state = lambda state, device=_CPU: torch.set_rng_state(state)
        self.manual_seed = torch.manual_seed

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def current_stream(self, device: Any = None) -> None:
        """No stream: what asks for one on the way only waits for events that are not there."""

    def synchronize(self, device: Any = None) -> None:
        """Nothing is in flight."""

    def empty_cache(self) -> None:
        """Nothing is cached."""


class _CpuTorch(types.ModuleType):
    """torch as megatron-core sees it. Whatever is not about the device is torch's own."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_STAND_IN = _CpuTorch()


def _replace_torch(module: types.ModuleType) -> None:
    # Fused kernels are left alone: they are compiled by torch, which would trace the stand-in.
    if not module.__name__.startswith(f"{_PACKAGE}.fusions") and vars(module).get("torch") is torch:
        vars(module)["torch"] = _STAND_IN


class _LaterImports(importlib.abc.MetaPathFinder):
    """Gives the stand-in to modules of megatron-core as they are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find as usual; run the module, then replace its `torch`."""
        if not name.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        _replace_torch(module)


def _accept_cpu_types(function: types.FunctionType) -> None:
    """Let a function that compares tensor types with "torch.cuda.*Tensor" mean the CPU's."""
    constants = tuple(
        c.replace("torch.cuda.", "torch.") if isinstance(c, str) and c.endswith("Tensor") else c
        for c in function.__code__.co_consts
    )
    function.__code__ = function.__code__.replace(co_consts=constants)


def _use_cpu_random_state() -> None:
    """Megatron's random state tracker and its recompute keep the CPU generator's state."""
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = _CPU, clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state, random._set_cuda_rng_state = get_state, set_state
    # Its fork warns when the CPU state moves, which is here what it is for.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def install_cpu_megatron() -> None:
    """Make megatron.core, imported or yet to be imported, run on the CPU. Repeating it is free.

    Lasts as long as the process; call it only where the device is the CPU.
    """
    if any(isinstance(finder, _LaterImports) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _LaterImports())
    for name, module in list(sys.modules.items()):
        if name == _PACKAGE or name.startswith(f"{_PACKAGE}."):
            _replace_torch(module)
    with warnings.catch_warnings():  # on the CPU there is no fused library to miss
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron.core.optimizer import clip_grads, distrib_optimizer

    _use_cpu_random_state()
    _accept_cpu_types(clip_grads.clip_grad_by_total_norm_fp32)
    shares = distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups
    _accept_cpu_types(shares.__func__)
