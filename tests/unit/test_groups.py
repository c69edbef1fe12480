from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel import groups
from megatron_kvpo.parallel.collect import (
    all_equal,
    gather_rows,
    leveled_shares,
    mean_over,
    share_of,
    shares,
)
from megatron_kvpo.parallel.groups import (
    Axis,
    before_stop,
    check_sizes,
    is_first,
    start_ranks,
    stop_ranks,
)


def test_the_data_axis_is_what_remains():
    assert check_sizes(1, ParallelConfig()) == 1
    assert check_sizes(16, ParallelConfig(tensor=2, branch=2)) == 4
    assert check_sizes(8, ParallelConfig(tensor=2, context=2, branch=2)) == 1


def test_ranks_that_do_not_divide_are_refused_with_numbers_and_remedy():
    with pytest.raises(ValueError, match=r"6 ranks.*tensor 2 x.*branch 2: start a multiple of 4"):
        check_sizes(6, ParallelConfig(tensor=2, branch=2))


def test_sizes_are_checked_before_torch_distributed_starts(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 ranks cannot be split"):
        start_ranks(ParallelConfig(tensor=2), "cpu")
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
        start_ranks(ParallelConfig(), "cuda")


@pytest.mark.parametrize(("n", "size"), [(8, 3), (2, 4), (0, 2), (9, 1), (7, 7)])
def test_shares_cover_all_items_once_in_order_and_differ_by_at_most_one(n, size):
    parts = shares(n, size)
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert sorted(map(len, parts), reverse=True) == list(map(len, parts))


@pytest.mark.parametrize(
    ("loads", "cost", "counts"),
    [([0, 0], 1, [4, 4]), ([10, 4], 2, [3, 5]), ([100, 0, 0], 1, [0, 4, 4]), ([5], 3, [8])],
)
def test_leveled_shares_even_out_what_the_ranks_carry(loads, cost, counts):
    parts = leveled_shares(8, lambda k: k * cost, loads)
    assert [i for part in parts for i in part] == list(range(8))
    assert list(map(len, parts)) == counts


def test_leveled_shares_fill_batches_of_which_a_part_costs_as_much():
    def pairs(count):
        return 2.0 * ((count + 1) // 2)

    assert [len(part) for part in leveled_shares(8, float, [10.0, 7.5])] == [3, 5]
    assert [len(part) for part in leveled_shares(8, pairs, [10.0, 7.5])] == [2, 6]
    assert [len(part) for part in leveled_shares(4, pairs, [1.0] * 4)] == [1, 1, 1, 1]  # spread


def test_a_negative_number_of_items_is_refused():
    with pytest.raises(ValueError, match="-1 items"):
        shares(-1, 2)


@pytest.fixture
def alone():
    state = torch.get_rng_state()
    ranks = start_ranks(ParallelConfig(timeout_s=120), "cpu")
    assert torch.equal(state, torch.get_rng_state()), "starting moved the global generator"
    yield ranks
    stop_ranks()


def test_one_process_outside_torchrun_is_every_axis_at_once(alone):
    assert (alone.world, alone.rank, is_first(alone)) == (1, 0, True)
    for axis in (alone.tensor, alone.context, alone.branch, alone.data, alone.replicas):
        assert (axis.size, axis.rank) == (1, 0)
        assert dist.get_world_size(axis.group) == 1
    with pytest.raises(RuntimeError, match="call stop_ranks first"):
        start_ranks(ParallelConfig(), "cpu")


class _Holder:
    def __init__(self):
        self.up, self.calls = None, 0
        before_stop(self.forget)

    def forget(self):
        self.up, self.calls = dist.is_initialized(), self.calls + 1


def test_what_holds_communication_lets_it_go_before_the_ranks_stop():
    start_ranks(ParallelConfig(timeout_s=120), "cpu")
    held, gone = _Holder(), _Holder()
    del gone
    stop_ranks()
    assert (held.up, held.calls) == (True, 1)
    start_ranks(ParallelConfig(timeout_s=120), "cpu")
    stop_ranks()
    assert held.calls == 1


def test_sums_keep_one_order_while_the_ranks_are_up_if_asked_to(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    start_ranks(ParallelConfig(timeout_s=120, deterministic=True), "cpu")
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        stop_ranks()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # somebody else's
    try:
        start_ranks(ParallelConfig(timeout_s=120), "cpu")
        stop_ranks()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, "a"),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, ""), ({"PYTORCH_ALLOC_CONF": "b"}, None),
    ],
)  # fmt: skip
def test_cudas_segments_grow_in_place_unless_the_user_chose(monkeypatch, own, found):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "to be undone")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    groups._grow_segments()
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == found


def test_collecting_over_one_rank_changes_nothing(alone):
    x = torch.randn(3, 2)
    assert torch.equal(gather_rows(x, alone.branch, [3]), x)
    assert torch.equal(mean_over(x, alone.data), x)
    assert all_equal(x, alone.replicas) == (True, 0.0)
    assert share_of(5, alone.branch) == range(5)


def test_gathered_sizes_must_fit_the_axis_and_the_rows():
    axis = Axis(size=1, rank=0, group=None)  # type: ignore[arg-type]
    for sizes in ([2], [3, 1]):
        with pytest.raises(ValueError, match="holds 3 rows"):
            gather_rows(torch.zeros(3, 2), axis, sizes)


def test_only_megatron_sees_the_cpu_in_place_of_cuda(alone):
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.tensor_parallel import mappings

    assert mappings.torch.cuda.current_device() == torch.device("cpu")
    assert mappings.torch.zeros(1, device="cuda").device.type == "cpu"
    assert parallel_state.torch.distributed is torch.distributed
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.zeros.__module__ != "megatron_kvpo.parallel.cpu"
    before = torch.get_rng_state()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.randn(3)
    assert torch.equal(before, torch.get_rng_state())
    with tensor_parallel.get_cuda_rng_tracker().fork():
        assert not torch.equal(inside, torch.randn(3)), "the tracked stream did not advance"
