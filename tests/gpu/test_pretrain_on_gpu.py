"""A GPU's training steps are a CPU's, and the same whether blocks are kept, recomputed or held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.model import sight
from megatron_kvpo.parallel.groups import Ranks, start_ranks, stop_ranks
from megatron_kvpo.training.learner import Learner
from megatron_kvpo.training.pretrain import empty_text
from tests.unit.tiny_pretrain import LORA, Clips, lively, recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDE = ["device=cuda", "model.hidden_dim=256", "model.num_heads=2", "model.ffn_dim=512"]
"""Heads of 128 features, as Wan's."""


@pytest.fixture(scope="module", autouse=True)
def _a_process_without_cpu_ranks() -> None:
    """Megatron that has been told to use the CPU goes on to."""
    from megatron.core.tensor_parallel import mappings

    if mappings.torch is not torch:
        pytest.skip("other tests had CPU ranks in this process: run tests/gpu by itself")


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Ranks]:
    yield start_ranks(ParallelConfig(timeout_s=120), "cuda")
    stop_ranks()


def losses(tmp_path, ranks: Ranks, *overrides: str, held: bool = False) -> list[float]:
    """Of six steps on one batch, the last three with own estimates."""
    config = recipe(tmp_path, *WIDE, "fitting.caption_drop=0", *overrides)
    learner: Learner = lively(config, ranks, empty_text(config))
    if held:
        learner.model.recompute._kept = lambda mode, hidden, blocks: (0, 0, blocks, blocks)
    batch = Clips(config, ranks).batch(0, 0, 4)
    batch = type(batch)(**{n: getattr(batch, n).cuda() for n in batch.__slots__})
    return [float(learner.train_step(batch, 0, own=s > 2, scale=1.0)) for s in range(6)]


@pytest.mark.parametrize("more", [[], LORA, [*LORA, "model.fp8=[ffn]"]], ids=["full", "lora", "8"])
def test_kept_recomputed_and_held_blocks_train_alike(tmp_path, on_gpu, more, monkeypatch):
    more = [*more, "model.dtype=bfloat16", "optimizer.lr=3e-3"]
    kept = losses(tmp_path, on_gpu, *more, "model.recompute=false")
    assert losses(tmp_path, on_gpu, *more, "model.recompute=true") == pytest.approx(kept, rel=2e-2)
    runs, forward = [], sight._forward
    monkeypatch.setattr(sight, "_forward", lambda *a: runs.append(1) or forward(*a))
    assert losses(tmp_path, on_gpu, *more, held=True) == pytest.approx(kept, rel=2e-2)
    layers, passes = 2, 6 + 3
    assert len(runs) == layers * passes, "attention of a held block ran again"
    assert losses(tmp_path, on_gpu, *more, "model.recompute=auto") == pytest.approx(kept, rel=2e-2)
    narrow = [x for x in more if x not in ("model.dtype=bfloat16", "model.fp8=[ffn]")]
    assert losses(tmp_path, on_gpu, *narrow) == pytest.approx(kept, rel=5e-2)
