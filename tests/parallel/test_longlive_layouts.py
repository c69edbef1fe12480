"""The golden LongLive runs hold for a model whose heads or tokens are shared between ranks."""

from __future__ import annotations

import pytest

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from tests.golden.longlive import Golden
from tests.ranks import on_ranks

LIMIT = 2e-5
"""Over the largest value of each tensor, as for one rank. Seen: 6e-7."""

LAYOUTS = {
    "tensor": ParallelConfig(tensor=2, timeout_s=200),
    "sequence": ParallelConfig(tensor=2, sequence_parallel=True, timeout_s=200),
    "context": ParallelConfig(context=2, timeout_s=200),
}


def _errors(rank: int) -> dict[str, dict[str, float]]:
    """Largest error of each golden run under each layout."""
    found = {}
    for name, parallel in LAYOUTS.items():
        golden = Golden(parallel, start_ranks(parallel, "cpu"))
        golden.run_stream("stream", None)
        golden.run_stream("switch", golden.sizes["switch_frame"])
        golden.run_stream("late_switch", golden.sizes["late_switch_frame"])
        golden.run_route_and_replay()
        found[name] = golden.errors
        stop_ranks()
    return found


@pytest.mark.gloo
def test_the_golden_runs_hold_over_two_ranks(tmp_path):
    for rank in on_ranks(2, _errors, folder=tmp_path, limit_s=240):
        for name, errors in rank.items():
            assert errors.keys() >= {"stream", "switch", "late_switch", "route", "replay"}
            assert max(errors.values()) < LIMIT, f"{name}: {errors}"
