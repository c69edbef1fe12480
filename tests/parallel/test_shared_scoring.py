"""Ranks that hold a video together have it scored once, and all hear the same scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.records import Clip
from megatron_kvpo.reward.composite import Scorer
from tests.ranks import on_ranks
from tests.unit.test_composite import PROMPT, STREAM, config, decode_rows, group_of, numbered


class Judge:
    """Scores differently on every rank, and counts what it is asked."""

    components = ("one", "two", "three")

    def __init__(self, rank: int) -> None:
        self.rank, self.clips = rank, 0

    def submit(self, clips: Sequence[Clip], names: Sequence[str]) -> Any:
        self.clips += len(clips)
        means_B = torch.stack([clip.frames_FCHW.mean() for clip in clips]) + self.rank
        places = [1 + self.components.index(name) for name in names]
        return lambda: torch.stack([place * means_B for place in places])


def scored(rank: int) -> dict[str, Tensor | int]:
    ranks = start_ranks(ParallelConfig(tensor=2, context=2, timeout_s=120), "cpu")
    judge, decoded = Judge(rank), 0

    def counting(latent_BFCHW: Tensor, shared_frames: int) -> Any:
        nonlocal decoded
        decoded += 1
        return decode_rows(latent_BFCHW, shared_frames)

    judges = [judge] if rank == 0 else []  # the others would build what is missing, and cannot
    scorer = Scorer(config(), STREAM, counting, judges, "cpu", (ranks.tensor, ranks.context))
    group = group_of(numbered(3))
    sent = [scorer.send_group(group), scorer.send_group(group)]
    first, second = (part.collect() for part in sent)
    assert torch.equal(first.global_KN, second.global_KN)
    scores = scorer.score_videos(group.latent_NFCHW, [PROMPT] * 3)
    alone = scorer.score_videos(group.latent_NFCHW, [PROMPT] * 3, alone=True) if rank == 0 else {}
    assert all(torch.equal(alone[name], scores[name]) for name in alone)
    stop_ranks()
    return {"local": first.local_KN, "global": first.global_KN, "clips": judge.clips,
            "decoded": decoded, **scores}  # fmt: skip


@pytest.mark.gloo
def test_the_first_of_tensor_and_context_ranks_scores_for_all(tmp_path):
    found = on_ranks(4, scored, folder=tmp_path)
    (plain,) = Scorer(config(), STREAM, decode_rows, [Judge(0)]).score_groups(
        [group_of(numbered(3))]
    )
    for rank, seen in enumerate(found):
        assert torch.equal(seen["local"], plain.local_KN)
        assert torch.equal(seen["global"], plain.global_KN)
        torch.testing.assert_close(seen["three"], 3 * seen["one"])
        assert (seen["clips"] > 0) == (rank == 0)
        assert (seen["decoded"] > 0) == (rank == 0)
    assert len({tuple(seen["one"].tolist()) for seen in found}) == 1
