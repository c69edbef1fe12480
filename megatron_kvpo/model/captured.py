"""Small passes as CUDA graphs: the host says once what a pass does, then only that it is due.

A pass of one row at Wan's size launches some thousand kernels, and the host takes as long for that
as the GPU for the work; shared between ranks, several times as long.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.parallel.groups import before_stop

Layers = tuple[tuple[Tensor, Tensor], ...]
"""Text keys and values of each layer."""

Compute = Callable[[Tensor, Tensor, Tensor, Layers, PassPages], Tensor]
"""latent_BFCHW, timestep_BF, table_2LE, text and pages -> velocity_BFCHW."""

_MOST = 64
"""Graphs that are kept; further kinds of passes run as usual."""


@dataclass(frozen=True, slots=True)
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    """Latents, timestep, table, pages to read and, if the pass writes, to write."""

    out: Tensor


class _Texts:
    """The place where every graph of a shape reads its text."""

    def __init__(self, layers: Layers) -> None:
        self.layers: Layers = tuple((k.clone(), v.clone()) for k, v in layers)
        self._there = layers

    def put(self, layers: Layers) -> None:
        if layers is not self._there:
            torch._foreach_copy_(_flat(self.layers), _flat(layers))
            self._there = layers


class CapturedPasses:
    """Runs passes of one kind as usual the first time, captures the second, replays the others."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        self._captures: dict[Any, _Capture] = {}
        self._texts: dict[Any, _Texts] = {}
        self._memory: Any = None
        before_stop(self.forget)

    def forget(self) -> None:
        """Let all graphs go, and the communication that is part of them."""
        for capture in self._captures.values():
            capture.graph.reset()
        self._captures.clear()
        self._seen.clear()
        self._texts.clear()
        self._memory = None

    def run(
        self, compute: Compute, latent_BFCHW: Tensor, timestep_BF: Tensor, table_2LE: Tensor,
        text: Layers, pages: PassPages, slot: str | None,
    ) -> Tensor:  # fmt: skip
        """What `compute` returns. `slot`: what acts, since its values may lie elsewhere."""
        inputs = [latent_BFCHW, timestep_BF, table_2LE, pages.read_BM]
        if pages.write_BF is not None:
            inputs.append(pages.write_BF)
        shapes = tuple((tuple(t.shape), t.dtype) for t in (*inputs, text[0][0]))
        kind = (shapes, slot, len(inputs), id(pages.pool), pages.own_from, pages.num_memory,
                pages.num_chosen, pages.fills_only)  # fmt: skip
        found = self._captures.get(kind)
        if found is None:
            if kind not in self._seen or len(self._captures) >= _MOST:
                self._seen.add(kind)
                return compute(latent_BFCHW, timestep_BF, table_2LE, text, pages)
            found = self._captures[kind] = self._capture(compute, inputs, text, pages)
        for held, value in zip(found.inputs, inputs, strict=True):
            held.copy_(value)
        self._text_of(text).put(text)
        found.graph.replay()
        return found.out.clone()

    def _text_of(self, text: Layers) -> _Texts:
        shape = tuple(text[0][0].shape)
        if shape not in self._texts:
            self._texts[shape] = _Texts(text)
        return self._texts[shape]

    def _capture(
        self, compute: Compute, inputs: list[Tensor], text: Layers, pages: PassPages
    ) -> _Capture:
        held = [value.clone() for value in inputs]
        place = self._text_of(text)
        at = dataclasses.replace(
            pages, read_BM=held[3], write_BF=held[4] if len(held) > 4 else None
        )
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks about events on a thread of its own, which a global capture forbids.
        at_once = torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local")
        with _uncollected(), at_once:
            out = compute(held[0], held[1], held[2], place.layers, at)
        return _Capture(graph, held, out)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles: graphs of a dead model may not end in a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _flat(layers: Layers) -> list[Tensor]:
    return [tensor for pair in layers for tensor in pair]
