"""Idle pages hold what backward needs: the same gradients, and nobody's keys and values change."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.model import arena as arena_module
from megatron_kvpo.model.arena import Arena
from megatron_kvpo.model.pages import PagePool
from megatron_kvpo.model.recompute import Recompute
from megatron_kvpo.rollout.stream import lent_pages
from tests.unit import small

ranks = small.ranks


@pytest.fixture(autouse=True)
def _small_tensors_count(monkeypatch):
    monkeypatch.setattr(arena_module, "_SMALLEST", 1)


def pool(pages: int = 8) -> PagePool:
    return PagePool(num_pages=pages, num_layers=2, tokens_per_frame=4, num_heads=2, head_dim=64,
                    device=torch.device("cpu"))  # fmt: skip


def test_the_longest_run_of_free_pages_is_reserved_and_some_stay_free():
    held = pool()
    taken = [held.take() for _ in range(4)]  # 0..3; then 1 and 2 come back
    held.drop(taken[1])
    held.drop(taken[2])
    assert held.reserve_run(leave=2) == range(4, 8)
    assert held.num_free == 2
    assert held.reserve_run(leave=2) == range(0)
    assert held.reserve_run(leave=1) == range(1, 2)
    assert pool().reserve_run(leave=9) == range(0)


def test_a_graph_saves_in_the_arena_and_goes_backward_as_without():
    held = pool()
    weight = torch.randn(256, 256, requires_grad=True)
    x = torch.randn(4, 256, requires_grad=True)

    def loss() -> torch.Tensor:
        wide = (x @ weight).t().contiguous().t()  # dense, and not in the usual order
        return (torch.tanh(wide) * torch.sigmoid(wide)).sum()

    want = torch.autograd.grad(loss(), (x, weight))
    lent = Arena(held, leave=0)
    with lent.saving():
        out = loss()
    assert sum(lent._used) > 0
    assert held.num_free == 0
    found = torch.autograd.grad(out, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    lent.release()
    assert held.num_free == 8


def test_one_tensor_saved_by_several_lies_there_once():
    held = pool()
    x = torch.randn(8, 64, requires_grad=True)
    lent = Arena(held, leave=0)
    with lent.saving():
        y = x * 1.5
        out = y.square().sum() + y.exp().sum() + y.sin().sum()
    used = sum(lent._used)
    assert y.numel() * 4 <= used <= 2 * y.numel() * 4  # y, and exp(y), which exp saves
    out.backward()
    torch.testing.assert_close(
        x.grad, 1.5 * (2 * y + y.exp() + y.cos()).detach(), rtol=1e-5, atol=1e-5
    )


def test_what_does_not_fit_or_is_a_parameter_stays_where_it_is():
    held = pool(1)
    lent = Arena(held, leave=0)
    big = torch.randn(held.key[0].numel() + 1, requires_grad=True)
    own = torch.nn.Parameter(torch.randn(4))
    with lent.saving():
        out = big.square().sum() + (own * own.detach()).sum()
    assert sum(lent._used) <= 256
    out.backward()
    assert torch.equal(big.grad, 2 * big.detach())


def test_saved_values_are_copies_of_their_time():
    """The arena keeps values: what is written over later does not matter."""
    held = pool()
    lent = Arena(held, leave=0)
    x = torch.randn(8, 64)
    weight = torch.randn(64, requires_grad=True)
    with lent.saving():
        out = (x * weight).sum()
    kept = x.clone()
    x.zero_()
    out.backward()
    torch.testing.assert_close(weight.grad, kept.sum(dim=0), rtol=1e-5, atol=1e-5)


def test_a_replay_goes_backward_through_lent_pages_as_without(ranks, monkeypatch):
    found, used = [], []
    for lends in (False, True):
        tiny = small.build(ranks, "model.recompute=auto", "policy.max_rows=2")
        tiny.stir("current", "old")
        sampled = tiny.roll_out()
        pages = list(sampled.prefix.tables[0].pages.values())
        before = tiny.world.pool.key[:, pages].clone()
        if lends:
            kept = lambda self, mode, hidden, blocks: (blocks, 0, 0, 0)  # noqa: E731
            monkeypatch.setattr(Recompute, "_kept", kept)
            reset = Arena.reset
            monkeypatch.setattr(
                Arena, "reset", lambda self, r=reset: (used.append(sum(self._used)), r(self))
            )
        tiny.policy.optimizer.zero_grad()
        tiny.stages.backward(0, [sampled], torch.ones(1, tiny.config.routing.num_branches))
        found.append({n: p.main_grad.clone() for n, p in tiny.policy.trained().items()})
        assert torch.equal(tiny.world.pool.key[:, pages], before)
        sampled.release()
        assert tiny.world.pool.num_free == tiny.num_pages
        assert tiny.model.recompute.arena is None
    assert max(used) > 0
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])


def test_pages_are_lent_only_where_the_memory_decides(ranks):
    tiny = small.build(ranks)
    with lent_pages(tiny.world, leave=0):
        assert tiny.model.recompute.arena is None
        assert tiny.world.pool.num_free == tiny.num_pages
