"""The golden runs hold for a model whose heads or tokens are shared between ranks."""

from __future__ import annotations

import pytest

from megatron_kvpo.config import ParallelConfig
from tests.golden import test_longlive, test_memflow
from tests.ranks import on_ranks
from tools.golden import Dtype, replay_file

LIMIT = 2e-5
"""Over the largest value of each tensor, as for one rank. Seen: 6e-7."""

LAYOUTS = {
    "tensor": ParallelConfig(tensor=2, timeout_s=200),
    "sequence": ParallelConfig(tensor=2, sequence_parallel=True, timeout_s=200),
    "context": ParallelConfig(context=2, timeout_s=200),
}

RUNS = {
    test_longlive.FILE: {"stream", "switch", "late_switch", "route", "replay"},
    test_memflow.FILE: {"stream", "bank"},
}


def errors_of(
    rank: int, device: str = "cpu", dtype: Dtype = "float32"
) -> dict[tuple[str, str], dict[str, float]]:
    """Largest error of each run of each golden file under each layout."""
    return {
        (file.name, name): replay_file(file, parallel, device, dtype).errors
        for file in RUNS
        for name, parallel in LAYOUTS.items()
    }


def check_errors(found: dict[tuple[str, str], dict[str, float]], limit: float) -> None:
    """Every run was replayed, and every number of it is within the limit."""
    for file, runs in RUNS.items():
        for name in LAYOUTS:
            errors = found[file.name, name]
            assert errors.keys() >= runs
            assert max(errors.values()) < limit, f"{file.name}, {name}: {errors}"


@pytest.mark.gloo
def test_the_golden_runs_hold_over_two_ranks(tmp_path):
    for rank in on_ranks(2, errors_of, folder=tmp_path):
        check_errors(rank, LIMIT)
