"""One GPU does what a CPU does: the same numbers, and without making the host wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.model import fused
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.rollout.sampler import extend
from tests.golden import test_longlive, test_memflow
from tests.unit import small
from tools.golden import replay_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference over the largest value."""


def far(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((ours.cpu().double() - theirs.cpu().double()).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[small.Small]:
    joined = start_ranks(ParallelConfig(timeout_s=60), "cuda")
    yield small.build(joined, "device=cuda")
    stop_ranks()


@pytest.mark.parametrize(
    "file", [test_longlive.FILE, test_memflow.FILE], ids=["longlive", "memflow"]
)
def test_the_golden_runs_hold_in_float32(file):
    errors = replay_file(file, ParallelConfig(timeout_s=60), "cuda").errors
    assert max(errors.values()) < 2e-5, errors


CASES = {
    "modulated_norm": ((7, 3, 32), (1, 3, 32), (1, 3, 32), 1e-6),
    "gated_add": ((7, 3, 32), (7, 3, 32), (1, 3, 32)),
    "sum_of_squares": ((7, 3, 32),),
    "rms_scaled": ((7, 3, 32), None, (32,), 32, 1e-6),
    "rms_rotated": ((7, 3, 32), None, (32,), (2, 7, 4), 32, 1e-6),
}


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(CASES))
def test_a_fused_kernel_is_the_function_it_is_made_of(name, dtype):
    function = getattr(fused, name)
    drawn = [noise(a, name, i) if isinstance(a, tuple) else a for i, a in enumerate(CASES[name])]
    if name == "rms_rotated":
        drawn[3] = torch.stack([drawn[3][0].cos(), drawn[3][0].sin()])
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        values = [
            a.to(device, kind if i != 3 else torch.float32) if isinstance(a, Tensor) else a
            for i, a in enumerate(drawn)
        ]
        leaves = [a.requires_grad_() for a in values[:1]]
        out = function(*values)
        weights = noise(tuple(out.shape), name, "weights").to(out)
        (out * weights).sum().backward()
        found.append((out.detach(), leaves[0].grad))
    for ours, theirs in zip(found[1], found[0], strict=True):
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


def test_energies_and_gradients_are_those_of_a_cpu(on_gpu):
    on_gpu.stir("current", "old")
    found = []
    groups = [on_gpu.roll_out()]
    for recompute in (False, True):
        model = on_gpu.model
        model.model_config = dataclasses.replace(model.model_config, recompute=recompute)
        on_gpu.policy.optimizer.zero_grad()
        weight = torch.ones(1, len(on_gpu.stages.branches), device="cuda")
        on_gpu.stages.backward(0, groups, weight)
        gradients = {n: p.main_grad.clone() for n, p in on_gpu.policy.trained().items()}
        found.append((on_gpu.energies(groups[0], "current"), gradients))
    groups[0].release()
    stop_ranks()
    alone = start_ranks(ParallelConfig(timeout_s=60), "cpu")
    tiny = small.build(alone)
    tiny.stir("current", "old")
    group = tiny.roll_out()
    tiny.policy.optimizer.zero_grad()
    tiny.stages.backward(0, [group], torch.ones(1, len(tiny.stages.branches)))
    wanted = {n: p.main_grad for n, p in tiny.policy.trained().items()}
    energy = tiny.energies(group, "current")
    for energies, gradients in found:
        assert far(energies, energy) < 1e-4
        for name, gradient in gradients.items():
            assert far(gradient, wanted[name]) < 1e-3, name
    stop_ranks()
    start_ranks(ParallelConfig(timeout_s=60), "cuda")  # for the fixture to leave
