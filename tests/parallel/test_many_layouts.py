"""One update in both types under every layout of two CPU ranks, as tests/gpu asks of GPUs."""

from __future__ import annotations

import pytest

from tests.gpu.test_many_gpus import TWO, check_teeth, check_updates, updates_of
from tests.ranks import on_ranks

LIMIT_S = 300


@pytest.mark.gloo
@pytest.mark.slow
def test_two_ranks_compute_the_update_of_one_in_either_type(tmp_path):
    (alone,) = on_ranks(1, updates_of, {"alone": []}, "cpu", folder=tmp_path, limit_s=LIMIT_S)
    check_teeth(alone)
    ranks = on_ranks(2, updates_of, TWO, "cpu", folder=tmp_path, limit_s=LIMIT_S)
    check_updates(ranks, alone)
