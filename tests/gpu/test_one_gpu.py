"""One GPU does what a CPU does: the same numbers, and without making the host wait."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import LogConfig, ParallelConfig
from megatron_kvpo.model import fused
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.rollout.sampler import extend
from megatron_kvpo.stopwatch import count, stage
from megatron_kvpo.training.metrics import Meter
from tests.golden import test_longlive, test_memflow
from tests.ranks import on_ranks
from tests.unit import small
from tools.golden import TOLERANCES, replay_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference over the largest value."""


def far(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((ours.cpu().double() - theirs.cpu().double()).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module", autouse=True)
def _a_process_without_cpu_ranks() -> None:
    """Megatron that has been told to use the CPU goes on to."""
    from megatron.core.tensor_parallel import mappings

    if mappings.torch is not torch:
        pytest.skip("other tests had CPU ranks in this process: run tests/gpu by itself")


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[small.Small]:
    joined = start_ranks(ParallelConfig(timeout_s=120), "cuda")
    yield small.build(joined, "device=cuda")
    stop_ranks()


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    "file", [test_longlive.FILE, test_memflow.FILE], ids=["longlive", "memflow"]
)
def test_the_golden_runs_hold(file, dtype):
    errors = replay_file(file, ParallelConfig(timeout_s=120), "cuda", dtype).errors
    assert max(errors.values()) < TOLERANCES[dtype], errors


WIDE, ROW = (7, 3, 32), (1, 3, 32)
CASES = {
    "residual_norm": (WIDE, WIDE, ROW, ROW, ROW, 1e-6),
    "gated_add": (WIDE, WIDE, ROW),
    "sum_of_squares": (WIDE,),
    "rms_scaled": (WIDE, None, (32,), 32, 1e-6),
    "rms_rotated": (WIDE, None, (32,), (2, 7, 4), 32, 1e-6),
}


def fused_result(name: str, device: str, dtype: torch.dtype, graph: bool) -> list[Tensor]:
    """A function's value and, with a graph, the gradient of its first argument."""
    drawn = [noise(a, name, i) if isinstance(a, tuple) else a for i, a in enumerate(CASES[name])]
    values = [a.to(device, dtype) if isinstance(a, Tensor) else a for a in drawn]
    if name == "rms_rotated":
        values[3] = torch.stack([drawn[3][0].cos(), drawn[3][0].sin()]).to(device)
    first = values[0].requires_grad_(graph)
    with torch.set_grad_enabled(graph):
        out = getattr(fused, name)(*values)
    out = torch.cat(out) if isinstance(out, tuple) else out
    if not graph:
        return [out]
    (out * noise(tuple(out.shape), name, "weights").to(out)).sum().backward()
    return [out.detach(), first.grad]


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_fused_kernel_is_the_function_it_is_made_of(name, dtype, graph):
    wanted = fused_result(name, "cpu", torch.float64, graph)
    for ours, theirs in zip(fused_result(name, "cuda", dtype, graph), wanted, strict=True):
        assert far(ours, theirs) < CLOSE[dtype]


def test_pages_and_own_tokens_are_joined_in_order():
    pages, own = noise((6, 4, 2, 8), "pages").cuda(), noise((2, 5, 2, 8), "own").cuda()
    table = torch.tensor([[3, 0], [5, 5]], device="cuda")
    joined = fused.joined(pages, table, own)
    for row, (first, second) in enumerate(table.tolist()):
        expected = torch.cat([pages[first], pages[second], own[row]])
        assert torch.equal(joined[row], expected)


@torch.no_grad()
def test_a_block_never_waits_for_the_gpu(on_gpu):
    """Four denoising steps and the pass that fills the cache, routed, after one of each to warm."""
    stream = on_gpu.streamed(15, rows=2)
    draw = on_gpu.noises().shared(15, 2)
    routes = [(3, 5, 6, 8, 9), ()]
    extend(stream, draw, (0,), routes)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        record = extend(stream, draw, (1,), routes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert record.clean.isfinite().all()
    stream.release()


def replayed(tiny: small.Small, *recompute: bool) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Energies of one group and gradients of their sum, with and without recomputation."""
    groups, found = [tiny.roll_out()], []
    weight = torch.ones(1, tiny.config.routing.num_branches, device=tiny.ranks.device)
    for again in recompute:
        tiny.model.model_config = dataclasses.replace(tiny.model.model_config, recompute=again)
        tiny.policy.optimizer.zero_grad()
        tiny.stages.backward(0, groups, weight)
        tiny.policy.optimizer.finalize()
        gradients = {n: p.main_grad.clone() for n, p in tiny.policy.trained().items()}
        found.append((tiny.energies(groups[0], "current"), gradients))
    groups[0].release()
    return found


def replayed_on_a_cpu(rank: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    tiny = small.build(start_ranks(ParallelConfig(timeout_s=120), "cpu"))
    tiny.stir("current", "old")
    found = replayed(tiny, False)
    stop_ranks()
    return found


def test_energies_and_gradients_are_those_of_a_cpu(on_gpu, tmp_path):
    """The CPU's in a process of its own, so that this one's Megatron stays on the GPU."""
    ((wanted,),) = on_ranks(1, replayed_on_a_cpu, folder=tmp_path)
    on_gpu.stir("current", "old")
    for energy, gradients in replayed(on_gpu, False, True):
        assert far(energy, wanted[0]) < 1e-4
        for name, gradient in gradients.items():
            assert far(gradient, wanted[1][name]) < 1e-3, name


def test_a_meter_times_the_gpus_work_without_waiting_for_it(on_gpu):
    meter = Meter(LogConfig(peak_tflops=1000.0), on_gpu.ranks)
    large = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    (large @ large).sum().item()
    with meter.running():
        meter.read()
        began = time.perf_counter()
        with stage("replay"):
            for _ in range(100):
                large @ large
            count(1.0, 1, needed_flops=100 * 2 * 8192.0**3, tokens=1.0)
        with stage("step"):
            pass
        queued_s = time.perf_counter() - began
        found = meter.read()
        whole_s = time.perf_counter() - began
    assert queued_s < 0.5 * found["time/replay_s"] < found["time/replay_s"] < whole_s
    assert found["time/step_s"] < 0.1 * found["time/replay_s"]
    assert 0.2 < found["speed/replay_mfu"] < 1
    assert found["memory/peak_gib"] >= large.nbytes / 2**30


SEGMENTS = """
import torch
from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.groups import start_ranks
kept = torch.zeros(3 << 20, device=start_ranks(ParallelConfig(timeout_s=120), "cuda").device)
print([segment["is_expandable"] for segment in torch.cuda.memory_snapshot()])
"""


@pytest.mark.parametrize(
    ("own", "grows"),
    [({}, True), ({"PYTORCH_ALLOC_CONF": ""}, False), ({"PYTORCH_CUDA_ALLOC_CONF": ""}, False)],
)
def test_segments_grow_in_place_unless_the_user_chose(own, grows):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE")
    variables = {k: v for k, v in os.environ.items() if k not in names} | own
    ended = subprocess.run(
        [sys.executable, "-c", SEGMENTS], env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1] == f"[{grows}]"
