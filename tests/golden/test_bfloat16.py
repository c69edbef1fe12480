"""The public models' float32 numbers, repeated in bfloat16 as closely as it can."""

from __future__ import annotations

import pytest

from megatron_kvpo.config import ParallelConfig
from tests import quiet
from tests.golden import test_longlive, test_memflow
from tools import golden as tool

FILES = [test_longlive.FILE, test_memflow.FILE]

_quiet_afterwards = quiet.quiet_afterwards


@pytest.mark.parametrize("file", FILES, ids=["longlive", "memflow"])
def test_every_run_is_off_by_bfloat16s_rounding(file):
    found = tool.replay_file(file, ParallelConfig(timeout_s=120), dtype="bfloat16")
    assert found.compared == found.golden.results
    for run, error in found.errors.items():
        assert error < tool.TOLERANCES["bfloat16"], run
        if run != "bank":  # a norm of many keys, whose roundings cancel
            assert error > 1e-3, f"{run} is no bfloat16 run"


def test_the_tool_takes_a_dtype_and_its_tolerance(capsys):
    arguments = [str(test_memflow.FILE), "--dtype", "bfloat16"]
    assert tool.main(arguments) == 0
    assert tool.main([*arguments, "--tolerance", str(tool.TOLERANCES["float32"])]) == 1
    assert "above the tolerance of 2e-05" in capsys.readouterr().err
