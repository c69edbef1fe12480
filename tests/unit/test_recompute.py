"""Blocks are kept or recomputed as the setting says; auto asks how much memory is left."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_kvpo.model import recompute
from megatron_kvpo.model.recompute import Recompute

BLOCKS, SIZE, GIB, SPARE = 5, 400 * 2**20, 2**30, recompute.SPARE_BYTES


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


@pytest.mark.parametrize(
    ("free", "kept"),
    [
        (0, 0), (SPARE, 0), (SPARE + 3 * SIZE - 1, 0), (SPARE + 3 * SIZE, 1), (SPARE + 5 * SIZE, 3),
        (SPARE + 7 * SIZE, BLOCKS), (100 * GIB, BLOCKS),
    ],
)  # fmt: skip
def test_auto_keeps_one_block_of_a_new_shape_and_then_as_many_as_fit(memory, free, kept):
    """The reserve and two blocks' worth are left alone."""
    passes, hidden = Recompute(), torch.ones(2, 3).as_subclass(OnGpu)
    assert ran("auto", hidden, passes)[0] == [1, *[2] * (BLOCKS - 1)]
    memory["free"] = free
    assert ran("auto", hidden, passes)[0] == [*[1] * kept, *[2] * (BLOCKS - kept)]
    other = torch.ones(4, 3).as_subclass(OnGpu)
    assert ran("auto", other, passes)[0] == [1, *[2] * (BLOCKS - 1)], "it was not measured"


@pytest.mark.parametrize(
    ("free", "kept", "held"),
    [(0, 0, 0), (4, 0, 4), (5, 0, 5), (7, 0, 5), (8, 1, 4), (11, 2, 3), (20, BLOCKS, 0)],
)
def test_attention_is_held_where_whole_blocks_do_not_fit(memory, free, kept, held):
    """A block takes 4 units, its attention 1; inputs of all blocks are paid first."""
    passes, hidden = Recompute(), torch.ones(2, 3).as_subclass(OnGpu)
    passes._bytes[hidden.shape], passes._held_bytes[hidden.shape] = 4 * GIB, GIB
    inputs = BLOCKS * hidden.numel() * hidden.element_size()
    memory["free"] = SPARE + 8 * GIB + inputs + free * GIB
    assert passes._kept("auto", hidden, BLOCKS) == (0, kept, held)


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
