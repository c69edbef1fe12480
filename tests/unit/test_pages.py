"""Pages are shared, copied when written, given back once, and never run out silently."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.model.pages import PagePool, PageTable

LAYERS, TOKENS, HEADS, SIZE = 2, 3, 2, 4


def make_pool(pages: int = 4) -> PagePool:
    return PagePool(
        num_pages=pages, num_layers=LAYERS, tokens_per_frame=TOKENS, num_heads=HEADS,
        head_dim=SIZE, device=torch.device("cpu"),
    )  # fmt: skip


def holding(pool: PagePool, *frames: int) -> PageTable:
    table = PageTable(pool)
    for frame in frames:
        table.renew(frame)
    return table


def keys(rows: int, frames: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, frames * TOKENS, HEADS, SIZE, generator=rng)


def test_a_page_is_free_again_only_when_its_last_holder_lets_go():
    pool = make_pool()
    first = holding(pool, 0)
    second = first.fork()
    third = second.fork()
    first.release()
    third.release()
    assert pool.num_free == 3
    second.release()
    assert pool.num_free == 4


def test_a_fork_costs_no_page_until_it_writes():
    pool = make_pool()
    table = holding(pool, 0, 1)
    branches = [table.fork() for _ in range(5)]
    assert pool.num_free == 2
    assert all(branch.lookup([0, 1]) == table.lookup([0, 1]) for branch in branches)


def test_who_rewrites_a_shared_frame_takes_a_page_of_its_own():
    pool = make_pool()
    table = holding(pool, 0)
    branch = table.fork()
    before = keys(1, 1)
    pool.write(0, torch.tensor([table.lookup([0])]), before, before)
    page = branch.renew(0)
    assert page != table.pages[0]
    after = keys(1, 1, seed=1)
    pool.write(0, torch.tensor([[page]]), after, after)
    assert torch.equal(pool.read(0, torch.tensor([table.lookup([0])]))[0], before)
    assert torch.equal(pool.read(0, torch.tensor([branch.lookup([0])]))[0], after)


def test_rewriting_an_unshared_frame_costs_no_page():
    pool = make_pool()
    table = holding(pool, 0, 1)
    table.renew(1)
    assert pool.num_free == 2
    assert len(set(table.lookup([0, 1]))) == 2


def test_no_page_is_ever_in_two_hands():
    pool = make_pool(6)
    left, right = holding(pool, 0, 1, 2), holding(pool, 0, 1)
    left.evict(1)
    right.renew(7)
    right.renew(0)
    left.renew(9)
    held = [*left.pages.values(), *right.pages.values()]
    assert len(held) == len(set(held)) == 6
    assert pool.num_free == 0


def test_an_exhausted_pool_says_so_and_what_to_lower():
    pool = make_pool(3)
    table = holding(pool, 0, 1, 2)
    with pytest.raises(ValueError, match=r"all 3 pages are in use.*policy\.max_rows"):
        table.renew(3)
    table.evict(0)
    table.renew(3)


def test_a_frame_that_left_is_named_and_so_is_what_is_there():
    table = holding(make_pool(), 0, 1, 4)
    table.evict(1)
    with pytest.raises(ValueError, match=r"frames \[1, 3\] have left the cache.*\[0, 4\]"):
        table.lookup([0, 1, 3])


def test_evicting_from_one_branch_leaves_it_to_the_others():
    pool = make_pool()
    table = holding(pool, 0, 1)
    branch = table.fork()
    branch.evict(0)
    assert table.lookup([0, 1])
    assert pool.num_free == 2


@pytest.mark.parametrize("layer", range(LAYERS))
def test_what_is_read_is_what_was_written_in_the_order_asked_for(layer):
    pool = make_pool(6)
    tables = [holding(pool, 0, 1, 2), holding(pool, 0, 1, 2)]
    pages = torch.tensor([table.lookup([0, 1, 2]) for table in tables])
    key, value = keys(2, 3), keys(2, 3, seed=1)
    pool.write(layer, pages, key, value)
    seen_key, seen_value = pool.read(layer, pages[:, [2, 0]])
    order = [*range(2 * TOKENS, 3 * TOKENS), *range(TOKENS)]
    assert torch.equal(seen_key, key[:, order])
    assert torch.equal(seen_value, value[:, order])
    assert not pool.key[1 - layer].any(), "another layer was written"


def test_what_the_cache_holds_carries_no_gradient():
    pool = make_pool(2)
    pages = torch.tensor([holding(pool, 0).lookup([0])])
    key = keys(1, 1).requires_grad_()
    pool.write(0, pages, key * 2, key * 3)
    seen_key, seen_value = pool.read(0, pages)
    assert not seen_key.requires_grad
    assert not seen_value.requires_grad
    assert torch.equal(seen_value, key.detach() * 3)
