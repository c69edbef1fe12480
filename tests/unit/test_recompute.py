"""Blocks are kept or recomputed as the setting says; auto asks how much memory is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_kvpo.model import recompute
from megatron_kvpo.model.held import ATTENTION, FFN, KINDS, results_of
from megatron_kvpo.model.recompute import Recompute

BLOCKS, SIZE, GIB, SPARE = 5, 400 * 2**20, 2**30, recompute.SPARE_BYTES
OWN = 2 * 3 * 4
"""Bytes of a block's input."""

LEFT, INPUTS = SPARE + SIZE * 5 // 4, BLOCKS * OWN


class Block:
    """h -> sin(factor h), and how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, hidden: Tensor, factor: float) -> Tensor:
        self.runs += 1
        return (factor * hidden).sin()


def ran(
    mode: bool | str, hidden: Tensor, kept: Recompute | None = None
) -> tuple[list[int], Tensor]:
    """How often each block ran, backward included, and the gradient."""
    blocks = [Block() for _ in range(BLOCKS)]
    hidden = hidden.detach().requires_grad_()
    arguments = [(float(number),) for number in range(1, BLOCKS + 1)]
    out = (kept or Recompute()).run(mode, blocks, hidden, arguments)
    expected = hidden
    for (factor,) in arguments:
        expected = (factor * expected).sin()
    assert torch.equal(out, expected)
    out.sum().backward()
    assert hidden.grad is not None
    return [block.runs for block in blocks], hidden.grad


def test_all_blocks_run_twice_or_once_and_the_gradient_is_the_same():
    hidden = torch.linspace(-1, 1, 6).view(2, 3)
    (twice, again), (once, kept) = ran(True, hidden), ran(False, hidden)
    assert twice == [2] * BLOCKS
    assert once == [1] * BLOCKS
    assert torch.equal(again, kept)


def test_auto_keeps_every_block_on_a_cpu():
    assert ran("auto", torch.ones(2, 3))[0] == [1] * BLOCKS


class OnGpu(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def memory(monkeypatch) -> dict[str, int]:
    """A GPU's memory: `free` to take, `used` by this process and more at each look."""
    state = {"free": 100 * GIB, "used": 7 * GIB}

    def used() -> int:
        state["used"] += SIZE
        return state["used"]

    monkeypatch.setattr(recompute, "free_bytes", lambda device: state["free"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", used)
    return state


OTHERS = INPUTS - OWN
"""Inputs of all blocks but the last, which the reserve is for."""


@pytest.mark.parametrize(
    ("free", "kept"),
    [
        (0, 1), (LEFT, 1), (LEFT + OTHERS + SIZE - OWN - 1, 1), (LEFT + OTHERS + SIZE - OWN, 2),
        (LEFT + OTHERS + 3 * (SIZE - OWN), 4), (LEFT + 4 * SIZE - 1, 4), (LEFT + 4 * SIZE, BLOCKS),
        (100 * GIB, BLOCKS),
    ],
)  # fmt: skip
def test_auto_keeps_the_last_block_of_a_new_shape_and_then_as_many_as_fit(memory, free, kept):
    """The reserve and 5/4 of a block are left alone; who is recomputed has its input."""
    passes, hidden = Recompute(), torch.ones(2, 3).as_subclass(OnGpu)
    assert ran("auto", hidden, passes)[0] == [*[2] * (BLOCKS - 1), 1]
    memory["free"] = free
    assert ran("auto", hidden, passes)[0] == [*[2] * (BLOCKS - kept), *[1] * kept]
    other = torch.ones(4, 3).as_subclass(OnGpu)
    assert ran("auto", other, passes)[0] == [*[2] * (BLOCKS - 1), 1], "it was not measured"


@pytest.mark.parametrize(
    ("free", "kept", "attention", "ffn"),
    [
        (-1, 0, 0, 0), (0, 0, 0, 0), (7, 0, 3, 1), (9, 0, 4, 1), (10, 0, 5, 0), (12, 0, 5, 2),
        (15, 0, 5, 5), (19, 0, 5, 5), (20, 1, 4, 4), (24, 1, 4, 4), (35, 4, 1, 1), (40, 5, 0, 0),
    ],
)  # fmt: skip
def test_attention_is_held_first_then_the_feed_forward_then_whole_blocks(
    memory, free, kept, attention, ffn
):
    """Of six, the last in the reserve: 8 units and its input, attention 2, feed-forward 1."""
    passes, hidden = Recompute(), torch.ones(2, 3).as_subclass(OnGpu)
    size = 8 * GIB + OWN
    passes._bytes[hidden.shape] = size
    passes._held_bytes[hidden.shape] = {ATTENTION: 2 * GIB, FFN: GIB}
    memory["free"] = SPARE + size + size // 4 + INPUTS + free * GIB
    assert passes._kept("auto", hidden, BLOCKS + 1) == (0, 1 + kept, attention, ffn)


def test_lent_memory_takes_the_first_blocks_and_a_pass_without_a_sight_holds_one_kind(memory):
    passes, hidden = Recompute(), torch.ones(2, 3).as_subclass(OnGpu)
    passes._bytes[hidden.shape], passes._held_bytes[hidden.shape] = 16 * GIB, {FFN: GIB}
    passes.arena = SimpleNamespace(num_bytes=35 * GIB)
    memory["free"] = SPARE + 20 * GIB + GIB + INPUTS
    assert passes._kept("auto", hidden, BLOCKS) == (2, 1, 0, 1)
    passes.arena.num_bytes = 99 * GIB
    assert passes._kept("auto", hidden, BLOCKS) == (5, 0, 0, 0), "no last one is left"


class Lent:
    """Memory that is lent: counts the blocks that save into it."""

    num_bytes = 3 * SIZE

    def __init__(self) -> None:
        self.saved = 0

    def reset(self) -> None:
        """Nothing is kept."""

    @contextmanager
    def saving(self) -> Iterator[None]:
        """One block more."""
        self.saved += 1
        yield


def test_lent_memory_is_for_the_first_and_free_memory_for_the_last(memory):
    passes, hidden = Recompute(), torch.ones(2, 3).as_subclass(OnGpu)
    ran("auto", hidden, passes)
    passes.arena, memory["free"] = Lent(), 0
    assert ran("auto", hidden, passes)[0] == [1, 1, 2, 2, 1]
    assert passes.arena.saved == 2


def test_ranks_that_talk_within_a_block_follow_the_one_that_has_least(memory, monkeypatch):
    axes, asked = (SimpleNamespace(size=2),), []

    def smallest(values: list[int], over: object, device: torch.device) -> list[int]:
        asked.append((values, over))
        return [values[0] - 9 * GIB, values[1], values[2] - GIB, *values[3:]]

    monkeypatch.setattr(recompute, "smallest", smallest)
    passes, hidden = Recompute(axes), torch.ones(2, 3).as_subclass(OnGpu)
    passes._bytes[hidden.shape], passes._held_bytes[hidden.shape] = 8 * GIB, {FFN: GIB}
    memory["free"] = SPARE + 10 * GIB + INPUTS + 12 * GIB
    assert passes._kept("auto", hidden, BLOCKS) == (0, 1, 0, 3)
    assert asked == [([12 * GIB + INPUTS, 0, -8 * GIB, 0, -GIB], axes)]


class Holder(Block):
    """Leaves results of both kinds, or takes them: h -> sin(factor h)."""

    def __call__(self, hidden: Tensor, factor: float) -> Tensor:
        made = super().__call__(hidden, factor)
        for kind in KINDS:
            results_of(kind, lambda: (made, None))
        return made


def test_the_first_pass_learns_what_a_block_holds(memory, monkeypatch):
    passes = Recompute()
    hidden = torch.ones(2, 3).as_subclass(OnGpu).requires_grad_()
    passes.run("auto", [Holder() for _ in range(3)], hidden, [(1.0,)] * 3)
    assert passes._held_bytes == {hidden.shape: {ATTENTION: OWN, FFN: OWN}}
    monkeypatch.setattr(Recompute, "_kept", lambda *_: (0, 0, 2, 0))
    passes.run("auto", [Holder() for _ in range(3)], hidden, [(1.0,)] * 3)
    assert passes._held_bytes[hidden.shape][FFN] == OWN, "who holds one kind says nothing of others"


@pytest.mark.parametrize(
    ("share", "free", "reserved", "used", "left"),
    [
        (1.0, 60, 10, 4, 66),  # the device's free memory, and what the allocator keeps idle
        (1.0, 5, 10, 10, 5),
        (0.5, 60, 10, 4, 36),  # parallel.memory_gib allows half of 80
        (0.25, 60, 20, 20, 0),
    ],
)
def test_what_is_free_is_the_devices_or_what_the_process_may_still_take(
    monkeypatch, share, free, reserved, used, left
):
    answers = {
        "get_device_properties": SimpleNamespace(total_memory=80 * GIB),
        "get_per_process_memory_fraction": share, "mem_get_info": (free * GIB, 80 * GIB),
        "memory_allocated": used * GIB, "memory_reserved": reserved * GIB,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert recompute.free_bytes(torch.device("cuda")) == left * GIB
