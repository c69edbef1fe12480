"""Gradients that are averaged while the last pass goes on are those that are averaged after it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import OptimizerConfig, ParallelConfig
from megatron_kvpo.parallel.groups import Ranks, start_ranks, stop_ranks
from megatron_kvpo.training.optimizer import Optimizer, build_optimizer
from tests.parallel.tiny import CONFIG, SAMPLES, Tiny, own_samples, sample_loss, weights
from tests.ranks import on_ranks

SMALL = replace(CONFIG, bucket_mib=1e-6, grad_clip=1e9)
"""A bucket for each of the four parameters."""

KINDS = {"whole": SMALL, "shared": replace(SMALL, distributed=True)}


class Watched:
    """A model whose buckets are counted as they are sent off."""

    def __init__(self, ranks: Ranks, config: OptimizerConfig) -> None:
        self.model = Tiny(ranks, seed=0)
        self.optimizer: Optimizer = build_optimizer(self.model, self.model.config, config, ranks)
        self.sent: list[int] = []
        for index, group in enumerate(self.optimizer._wrapped.bucket_groups):
            group.start_grad_sync = self._noting(index, group.start_grad_sync)

    def _noting(self, index: int, send: Any) -> Any:
        def noted(**given: Any) -> None:
            if index not in self.sent:  # Megatron asks again at the end, and does nothing then
                self.sent.append(index)
            send(**given)

        return noted

    def push(self, update: int, sample: int, weight: float = 1.0) -> None:
        """One backward pass."""
        (weight * sample_loss(self.model, update, sample)).backward()

    def step(self, update: int) -> dict[str, Tensor]:
        """The weights after it."""
        self.optimizer.finalize()
        self.optimizer.step(update)
        return weights(self.model)


def _passes(ranks: Ranks, config: OptimizerConfig, last: bool) -> tuple[Any, list[list[int]]]:
    """Three updates of two passes; what was sent off before each finalize."""
    watched, early = Watched(ranks, config), []
    for update in range(3):
        watched.sent.clear()
        watched.optimizer.zero_grad()
        first, second = own_samples(ranks)
        watched.push(update, first)
        assert not watched.sent
        if last:
            watched.optimizer.last_pass()
        watched.push(update, second)
        early.append(list(watched.sent))
        found = watched.step(update)
    return found, early


def _parts(ranks: Ranks, config: OptimizerConfig, last: bool) -> tuple[Any, list[int]]:
    """Two parts of two passes, the last of them in two halves."""
    watched = Watched(ranks, config)
    watched.optimizer.zero_grad()
    for sample in own_samples(ranks):
        final = last and sample == own_samples(ranks)[-1]
        with watched.optimizer.part():
            watched.push(0, sample, 0.3)
            if final:
                watched.optimizer.last_pass()
            watched.push(0, sample, 0.7)
    early = list(watched.sent)
    if last:
        with pytest.raises(RuntimeError, match="no part of this"), watched.optimizer.part():
            pass
    return watched.step(0), early


def _uneven(ranks: Ranks, config: OptimizerConfig, last: bool) -> tuple[Any, list[int]]:
    """The second rank has nothing to send backward, and goes on to another collective."""
    watched = Watched(ranks, config)
    watched.optimizer.zero_grad()
    if ranks.rank == 0:
        for sample in range(SAMPLES):
            if last and sample == SAMPLES - 1:
                watched.optimizer.last_pass()
            watched.push(0, sample)
    early = list(watched.sent)
    watched.optimizer.reduce()
    assert watched.sent == sorted(watched.sent)
    torch.distributed.barrier(ranks.data.group)
    return watched.step(0), early


def _late(ranks: Ranks, config: OptimizerConfig) -> str:
    watched = Watched(ranks, config)
    watched.optimizer.zero_grad()
    watched.optimizer.last_pass()
    watched.push(0, 0)
    with pytest.raises(RuntimeError) as raised:
        watched.push(0, 1)
    return str(raised.value)


def _on_two(rank: int) -> dict[str, Any]:
    ranks = start_ranks(ParallelConfig(), "cpu")
    found: dict[str, Any] = {}
    for kind, config in KINDS.items():
        for name, case in (("passes", _passes), ("parts", _parts), ("uneven", _uneven)):
            found[f"{name}, {kind}"] = [case(ranks, config, last) for last in (True, False)]
        found[f"late, {kind}"] = _late(ranks, config)
    stop_ranks()
    return found


@pytest.mark.gloo
def test_buckets_go_off_in_the_last_pass_with_the_bits_of_those_that_go_after_it(tmp_path):
    every = [0, 1, 2, 3]
    for rank, found in enumerate(on_ranks(2, _on_two, folder=tmp_path)):
        for kind in KINDS:
            sent = {"passes": [every] * 3, "parts": every, "uneven": [] if rank else every}
            for name, expected in sent.items():
                (early, sent_early), (late, sent_late) = found[f"{name}, {kind}"]
                assert sent_early == expected, (name, kind, rank)
                assert not any(sent_late), (name, kind, rank)
                for key, value in late.items():
                    bits = (early[key].view(torch.int32), value.view(torch.int32))
                    assert torch.equal(*bits), (name, kind, key)
            assert "number 3, had been sent off" in found[f"late, {kind}"]  # the first it meets
