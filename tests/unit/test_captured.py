"""Nothing is collected while a pass is captured."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron_kvpo.model import captured
from megatron_kvpo.model.captured import CapturedPasses
from megatron_kvpo.model.pages import PassPages


@pytest.fixture
def graphs(monkeypatch) -> list[str]:
    """CUDA's graphs, that do nothing; what is asked of them."""
    asked = []

    def graph() -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: asked.append("replay"), reset=lambda: None)

    def capture(graph: object, **_: object) -> nullcontext[None]:
        asked.append("capture")
        return nullcontext()

    monkeypatch.setattr(captured.torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(captured.torch.cuda, "graph", capture)
    monkeypatch.setattr(captured.torch.cuda, "graph_pool_handle", object)
    return asked


@pytest.mark.parametrize("collects", [True, False])
def test_python_collects_no_cycles_during_a_capture_and_then_as_before(graphs, collects):
    """A dead model's graphs that are let go meanwhile would end the capture."""
    during = []

    def compute(latent, timestep, table, text, pages):
        during.append(gc.isenabled())
        if len(during) == 4:
            raise RuntimeError("a kernel's fault")
        return latent

    passes, numbers = CapturedPasses(), torch.ones(1, 1)
    pages = PassPages(SimpleNamespace(), torch.zeros(1, 1, dtype=torch.long))
    inputs = (numbers, numbers, numbers, ((numbers, numbers),), pages)
    gc.enable() if collects else gc.disable()
    try:
        for _ in range(3):
            passes.run(compute, *inputs, "current")
        assert gc.isenabled() == collects
        passes.run(compute, *inputs, "old")
        with pytest.raises(RuntimeError, match="a kernel's fault"):
            passes.run(compute, *inputs, "old")
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert during == [collects, False, collects, False]
    assert graphs == ["capture", "replay", "replay", "capture"]
