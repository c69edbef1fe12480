"""A save in the background of a GPU's tensors: what was there, from host memory, the same files."""

from __future__ import annotations

import threading

import pytest
import torch

from megatron_kvpo.checkpoint import writing
from megatron_kvpo.checkpoint.state import Saving, load, save
from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def _a_process_without_cpu_ranks() -> None:
    """Megatron that has been told to use the CPU goes on to."""
    from megatron.core.tensor_parallel import mappings

    if mappings.torch is not torch:
        pytest.skip("other tests had CPU ranks in this process: run tests/gpu by itself")


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path, monkeypatch):
    from megatron.core.dist_checkpointing import ShardedTensor

    ranks = start_ranks(ParallelConfig(timeout_s=120), "cuda")
    try:
        own = torch.arange(2**20, dtype=torch.float32, device=ranks.device).view(1024, 1024)

        def tree() -> dict[str, object]:
            return {"own": ShardedTensor.from_rank_offsets("own", own), "step": 3}

        ready = save(tmp_path / "now", 1, tree(), ranks, keep=1)
        gate, write = threading.Event(), writing.Writing._write
        monkeypatch.setattr(writing.Writing, "_write", lambda *a: (gate.wait(30), write(*a)))
        saving = Saving(tmp_path / "later", 1, tree(), ranks, 1, background=True)
        own.zero_()
        gate.set()
        later = saving.finish()
        for path in ready.iterdir():
            assert (later / path.name).read_bytes() == path.read_bytes(), path.name
        loaded = load(later, tree(), ranks)
        assert loaded["step"] == 3
        assert float(loaded["own"].flatten()[-1]) == 2**20 - 1
    finally:
        stop_ranks()
