"""What context ranks trade around attention travels while other work goes on, to the same bits."""

from __future__ import annotations

import gc
import inspect
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_kvpo.config import RunConfig
from megatron_kvpo.model.attention import SelfAttention, attend, heads_to_tokens, totals
from megatron_kvpo.model.fused import heads_apart, rms_rotated
from megatron_kvpo.model.pages import PagePool, PassPages
from megatron_kvpo.model.sight import Piece, Sight, attend_seen
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.parallel.exchange import Exchange
from megatron_kvpo.parallel.groups import Axis, Ranks, start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.training.heartbeat import _collective
from tests.parallel.tiny_run import tiny_config
from tests.ranks import on_ranks

TOKENS, ROWS, EPS = 8, 2, 1e-6
"""Tokens of a pass of one rank, and rows."""

LAYOUTS = {
    "context": ["parallel.context=2"],
    "four": ["parallel.context=4"],
    "tensor": ["parallel.context=2", "parallel.tensor=2"],
    "sequence": ["parallel.context=2", "parallel.tensor=2", "parallel.sequence_parallel=true"],
}
RUNS = [(2, ("context",)), (4, ("four", "tensor", "sequence"))]


class Watched:
    """Exchanges as they begin and are waited for, and layers as they are computed."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        send, self.events = dist.all_to_all_single, []

        def noted(*given: Any, async_op: bool = False, **named: Any) -> Any:
            self.events.append("start" if async_op else "exchange")
            work = send(*given, async_op=async_op, **named)
            return self._noting(work) if async_op else None

        with mock.patch.object(dist, "all_to_all_single", noted):
            yield self.events

    def _noting(self, work: Any) -> Any:
        def wait() -> None:
            self.events.append("wait")
            work.wait()

        return mock.Mock(wait=wait)

    def layers(self, attention: SelfAttention) -> None:
        """Forward by the layer's name, backward by that of its weight's gradient."""
        for name in "qkv":
            layer: Any = getattr(attention, name)
            note = self.events_of(name)
            layer.register_forward_hook(note)
            for weight in layer.parameters():
                if weight.requires_grad and weight.dim() == 2:
                    weight.register_post_accumulate_grad_hook(note)
                    break

    def events_of(self, name: str) -> Any:
        return lambda *_: self.events.append(name)


def synchronous(
    attention: SelfAttention, hidden: Tensor, table: Tensor, sight: Sight | None
) -> Tensor:
    """Self-attention, each exchange by itself, everything in the order in which it is written."""
    spec: Spec = attention._spec
    whole: Any = spec.share_input(hidden)
    made = [part(whole, shared=True) for part in (attention.q, attention.k, attention.v)]
    of_query, of_key = totals(spec, made[0], made[1])
    norms = (attention.norm_q, of_query), (attention.norm_k, of_key)
    turned = [
        rms_rotated(x, total, norm.weight, table, norm._dim, EPS)
        for x, (norm, total) in zip(made, norms, strict=False)
    ]
    parts = [*turned, attention._heads(made[2])]
    query, key, value = (spec.all_to_all(heads_apart(x, spec.ranks.context.size)) for x in parts)
    if sight is None:
        out = attend(query, key.transpose(0, 1), value.transpose(0, 1))
    else:
        out = attend_seen(query, key, value, sight)
    return attention.o(heads_to_tokens(out, spec).flatten(-2))


def _attention(config: RunConfig, ranks: Ranks, *, lora: bool) -> SelfAttention:
    policy = config.policy if lora else None
    spec = Spec.build(config.model, config.parallel, ranks, policy)
    attention = SelfAttention(config.model.hidden_dim, config.model.num_heads, EPS, spec, "x")
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            drawn = noise(tuple(parameter.shape), name, ranks.tensor.rank)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 + (1 if "norm" in name else 0))
            if lora:
                parameter.requires_grad_("lora" in name)
    if lora:
        spec.switch.slot = "current"
    return attention


def _gradients(attention: SelfAttention, run: Any, hidden: Tensor) -> dict[str, Tensor]:
    """The result, and gradients of the input and of what trains."""
    attention.zero_grad()
    x = hidden.clone().requires_grad_()
    out = run(x)
    (out * noise(tuple(out.shape), "gradient")).sum().backward()
    assert x.grad is not None
    found = {n: p.grad for n, p in attention.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "input": x.grad, **found}


def _check_layout(config: RunConfig, ranks: Ranks, *, lora: bool, sighted: bool) -> None:
    attention, watched = _attention(config, ranks, lora=lora), Watched()
    watched.layers(attention)
    size, shared = ranks.context.size, ranks.tensor.size if config.parallel.sequence_parallel else 1
    length = TOKENS * size
    half = length // 2
    sight = Sight((Piece((0, half), ((0, half),)), Piece((half, length), ((2, length),))))
    seen = sight if sighted else None
    phase = noise((length, config.model.hidden_dim // config.model.num_heads // 2), "phase")
    own = slice(ranks.context.rank * TOKENS, (ranks.context.rank + 1) * TOKENS)
    table = torch.stack([phase.cos(), phase.sin()])[:, own]
    shape = (TOKENS // shared, ROWS, config.model.hidden_dim)
    hidden = noise(shape, "x", ranks.context.rank, ranks.tensor.rank if shared > 1 else 0)

    def ours(x: Tensor) -> Tensor:
        return attention(x, table, 0, None, seen)

    def again(x: Tensor) -> Tensor:
        return checkpoint(ours, x, use_reentrant=False)

    wanted = _gradients(attention, lambda x: synchronous(attention, x, table, seen), hidden)
    assert len(wanted) > 6
    assert all(float(x.abs().max()) > 0 for x in wanted.values())
    with watched.watching() as events:
        found = _gradients(attention, ours, hidden)
    _check_order(list(events), joint=ranks.tensor.size > 1)
    with watched.watching() as events:
        repeated = _gradients(attention, again, hidden)
    assert events.count("start") == events.count("wait") == 9  # forward, again, backward
    with torch.no_grad():
        with watched.watching() as events:
            plain = ours(hidden)
        assert events.count("start") == events.count("wait") == 3
        assert events.index("wait") > 4
        with (
            mock.patch("megatron_kvpo.parallel.exchange._captures", return_value=True),
            watched.watching() as events,
        ):
            captured = ours(hidden)
        assert [events.count(name) for name in ("start", "exchange")] == [0, 4]
    assert torch.equal(plain, wanted["out"])
    assert torch.equal(captured, wanted["out"])
    for name, theirs in wanted.items():
        assert torch.equal(found[name], theirs), name
        assert torch.equal(repeated[name], theirs), f"{name}, recomputed"


def _check_order(events: list[str], *, joint: bool) -> None:
    """All three are under way before the first is waited for; what can be, beside a layer."""
    waits, starts = ["wait"] * 3, ["start"] * 3
    forward = [*"qk", "start", "start", "v", "start"] if joint else [
        "q", "start", "k", "start", "v", "start",
    ]  # fmt: skip
    backward = ["wait", "v", "wait", *(["wait", *"kq"] if joint else ["k", "wait", "q"])]
    expected = [*forward, *waits, "exchange", "exchange", *starts, *backward]
    assert events == expected, events


def _check_fill(config: RunConfig, ranks: Ranks) -> None:
    """The pages that it leaves are those of a whole pass."""
    attention = _attention(config, ranks, lora=True)
    heads = config.model.num_heads // ranks.context.size // ranks.tensor.size
    head_dim, place = config.model.hidden_dim // config.model.num_heads, ranks.device
    table = noise((2, TOKENS, head_dim // 2), "table")
    shared = ranks.tensor.size if config.parallel.sequence_parallel else 1
    shape = (TOKENS // shared, ROWS, config.model.hidden_dim)
    hidden = noise(shape, "x", ranks.context.rank, ranks.tensor.rank if shared > 1 else 0)
    pools = []
    for fills in (True, False):
        pool = PagePool(
            num_pages=ROWS, num_layers=1, tokens_per_frame=TOKENS * ranks.context.size,
            num_heads=heads, head_dim=head_dim, device=place,
        )  # fmt: skip
        none = torch.zeros((ROWS, 0), dtype=torch.long)
        pages = PassPages(pool, none, torch.arange(ROWS).view(ROWS, 1))
        with torch.no_grad():
            if fills:
                attention.fill(hidden, table, 0, pages)
            else:
                attention(hidden, table, 0, pages, None)
        pools.append(pool)
    assert float(pools[0].key.abs().max()) > 0
    assert torch.equal(pools[0].key, pools[1].key)
    assert torch.equal(pools[0].value, pools[1].value)


def _check_exchange(axis: Axis) -> None:
    """By itself: what comes, which memory is held how long, and what a hang would be called."""
    mine = torch.arange(2.0 * axis.size) + 100 * axis.rank
    with torch.no_grad():
        sent = mine.clone()
        exchange, gone = Exchange(sent, axis), weakref.ref(sent)
        del sent
        gc.collect()
        came = exchange.wait()
    assert gone() is None
    expected = [100 * r + 2 * axis.rank + i for r in range(axis.size) for i in range(2)]
    assert came.tolist() == expected
    with pytest.raises(AssertionError, match="once"):
        exchange.wait()

    leaf = mine.clone().requires_grad_()
    out = Exchange(2 * leaf, axis).wait()
    for times in (1, 2):  # through the same graph again
        out.backward(came, retain_graph=True)
        assert torch.equal(leaf.grad, 2 * times * mine)
    exchange, gone = Exchange(held := 2 * leaf, axis), weakref.ref(held)
    del exchange, held  # never waited for
    until = time.monotonic() + 60  # gloo's thread holds it till it has been sent
    while gone() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert gone() is None

    frames: list[FrameType | None] = []
    work = mock.Mock(wait=lambda: frames.append(inspect.currentframe()))
    with mock.patch.object(dist, "all_to_all_single", return_value=work):
        Exchange(mine, axis).wait()
    said = _collective(frames[0].f_back if frames[0] else None)
    assert said.startswith("all_to_all from parallel/exchange.py:"), said


def _check(rank: int, layouts: dict[str, RunConfig]) -> bool:
    for config in layouts.values():
        ranks = start_ranks(config.parallel, "cpu")
        for lora in (False, True):
            for sighted in (False, True):
                _check_layout(config, ranks, lora=lora, sighted=sighted)
        _check_fill(config, ranks)
        _check_exchange(ranks.context)
        stop_ranks()
    return True


@pytest.mark.gloo
@pytest.mark.parametrize(("world", "names"), RUNS, ids=["two ranks", "four ranks"])
def test_exchanges_beside_other_work_give_the_bits_of_those_by_themselves(
    world: int, names: tuple[str, ...], tmp_path: Path
) -> None:
    layouts = {name: tiny_config(tmp_path / name, *LAYOUTS[name]) for name in names}
    assert on_ranks(world, _check, layouts, folder=tmp_path) == [True] * world


def test_one_rank_has_the_same_tensor_and_no_node_more() -> None:
    alone = Axis(size=1, rank=0, group=None)  # type: ignore[arg-type]
    x = torch.ones(2, requires_grad=True) * 2
    assert Exchange(x, alone).wait() is x
    assert heads_apart(x, 1) is x


def test_norms_write_parts_of_heads_where_they_are_sent_from() -> None:
    x, weight = noise((6, 2, 32), "x").requires_grad_(), noise((32,), "weight")
    table = noise((2, 6, 4), "table")
    found = rms_rotated(x, None, weight, table, 32, EPS, 2)
    expected = heads_apart(rms_rotated(x, None, weight, table, 32, EPS), 2)
    assert found.shape == (12, 2, 2, 8)
    assert found.is_contiguous()
    assert torch.equal(found, expected)
    assert torch.equal(expected[6:], rms_rotated(x, None, weight, table, 32, EPS)[:, :, 2:])
    gradient = noise((12, 2, 2, 8), "gradient")
    ours, theirs = (torch.autograd.grad(y, x, gradient)[0] for y in (found, expected))
    assert torch.equal(ours, theirs)
