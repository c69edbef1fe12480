from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.collect import (
    all_equal,
    barrier,
    broadcast_object,
    gather_rows,
    mean_over,
    share_of,
    smallest,
)
from megatron_kvpo.parallel.groups import Axis, start_ranks, stop_ranks
from tests.ranks import on_ranks

AXES = ("tensor", "context", "branch", "data", "replicas")

# sizes of tensor, context, branch -> the ranks each axis joins, on 4 ranks
LAYOUTS = {
    (2, 1, 2): {"tensor": [[0, 1], [2, 3]], "branch": [[0, 2], [1, 3]],
                "replicas": [[0, 2], [1, 3]], "data": [[0], [1], [2], [3]]},
    (1, 2, 1): {"context": [[0, 1], [2, 3]], "data": [[0, 2], [1, 3]],
                "replicas": [[0, 2], [1, 3]], "branch": [[0], [1], [2], [3]]},
    (1, 1, 2): {"branch": [[0, 1], [2, 3]], "data": [[0, 2], [1, 3]],
                "replicas": [[0, 1, 2, 3]], "tensor": [[0], [1], [2], [3]]},
}  # fmt: skip


def _collect(rank: int, axis: Axis) -> dict[str, Any]:
    """What each collective brings over an axis of four ranks."""
    sizes = [2, 0, 3, 1]
    mine = torch.arange(sizes[rank] * 2, dtype=torch.float32).reshape(-1, 2) + 100 * rank
    same, minus = torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.0 if rank == 2 else 0.0])
    off = torch.tensor([1.0, 0.25 * (rank == 3)])
    nan = torch.tensor([float("nan") if rank == 1 else 1.0])
    barrier(axis)
    return {
        "rows": gather_rows(mine.requires_grad_(), axis, sizes),
        "mean": mean_over(torch.tensor([float(rank), 1.0]), axis),
        "object": broadcast_object({"plan": (rank, "routed")}, axis),
        "equal": [all_equal(x, axis) for x in (same, minus, off, nan, torch.zeros(0))],
        "share": list(share_of(6, axis)),
        "smallest": smallest([rank, 2**40 - rank], [axis], torch.device("cpu")),
    }


def _layouts(rank: int) -> dict[str, Any]:
    found: dict[Any, Any] = {}
    for tensor, context, branch in LAYOUTS:
        config = ParallelConfig(tensor=tensor, context=context, branch=branch, timeout_s=120)
        ranks = start_ranks(config, "cpu")
        found[tensor, context, branch] = {
            name: (
                dist.get_process_group_ranks(getattr(ranks, name).group),
                getattr(ranks, name).rank,
                getattr(ranks, name).size,
            )
            for name in AXES
        }
        if ranks.replicas.size == 4:
            found["collect"] = _collect(rank, ranks.replicas)
        stop_ranks()
    with pytest.raises(ValueError, match="4 ranks cannot be split"):
        start_ranks(ParallelConfig(tensor=3), "cpu")
    return found


@pytest.mark.gloo
def test_four_ranks_divide_as_promised_and_tell_each_other_the_truth(tmp_path):
    results = on_ranks(4, _layouts, folder=tmp_path)
    for sizes, axes in LAYOUTS.items():
        for name, groups in axes.items():
            for rank, result in enumerate(results):
                own = next(group for group in groups if rank in group)
                expected = (own, own.index(rank), len(own))
                assert result[sizes][name] == expected, (sizes, name, rank)
    for rank, result in enumerate(results):
        got = result["collect"]
        assert got["smallest"] == [0, 2**40 - 3]
        assert got["rows"].tolist() == [
            [0, 1], [2, 3], [200, 201], [202, 203], [204, 205], [300, 301],
        ]  # fmt: skip
        assert not got["rows"].requires_grad
        assert got["mean"].tolist() == [1.5, 1.0]
        assert got["object"] == {"plan": (0, "routed")}
        assert got["equal"] == [
            (True, 0.0), (False, 0.0), (False, 0.25), (False, float("inf")), (True, 0.0),
        ]  # fmt: skip
        assert got["share"] == [[0, 1], [2, 3], [4], [5]][rank]
