"""Low-rank adapters: several sets on one frozen base, switched per call.

Each linear layer of a block holds one (A, B) pair per slot; a `Switch` shared by all of them says
which slot acts. The four policies of a run (current, old, reference, ema) are four slots.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

SLOTS = ("current", "old", "reference", "ema")
"""`current` trains, `old` samples, `reference` anchors the KL, `ema` is evaluated."""


class Switch:
    """Which adapter slot acts in every adapted layer; None is the bare base.

    Choosing a slot readies its values to be computed with, so weights that change while their slot
    is chosen act at the next choice.
    """

    def __init__(self) -> None:
        self.adapters: list[Adapter] = []
        self._slot: str | None = None

    @property
    def slot(self) -> str | None:
        """The slot that acts."""
        return self._slot

    @slot.setter
    def slot(self, slot: str | None) -> None:
        self._slot = slot
        for adapter in self.adapters:
            adapter.choose(slot)


@dataclass(frozen=True, slots=True)
class LowRank:
    """A slot that acts: its parameters, and their values in the type that is computed with."""

    down: nn.Parameter
    """A [r, in], float32."""

    up: nn.Parameter
    """B [out, r], float32."""

    acting_down: Tensor
    acting_up: Tensor
    """May be a strided view."""

    scale: float
    """What A^T B^T is still to be multiplied by: `acting_up` may hold the adapter's scale."""


class Adapter(nn.Module):
    """The (A, B) pairs of one linear layer, one per slot. delta(x) = scale * B A x.

    `in_dim` and `out_dim` are this rank's. Under tensor parallelism one of A and B is sharded as
    the layer is (`partition` 0: B by rows, 1: A by columns) and the other is whole.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, partition: int, *,
        sequence: bool, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """`dtype` is the type that is computed with; the pairs themselves are float32."""
        super().__init__()
        self.scale, self._dtype = alpha / rank, dtype
        self.acting: LowRank | None = None
        self._ready: LowRank | None = None
        self.chosen: Callable[[LowRank | None], None] = lambda acting: None
        """Told of every choice."""

        self._place_down: Tensor | None = None
        self._place_up: Tensor | None = None
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for slot in SLOTS:
            down = nn.Parameter(torch.zeros(rank, in_dim), requires_grad=slot == "current")
            up = nn.Parameter(torch.zeros(out_dim, rank), requires_grad=slot == "current")
            sharded, whole = (up, down) if partition == 0 else (down, up)
            mark_sharded(sharded, partition)
            mark_replicated(whole, sequence=sequence)
            self.lora_A[slot], self.lora_B[slot] = down, up

    @torch.no_grad()
    def choose(self, slot: str | None) -> None:
        """Act with this slot's values as they are now."""
        if slot is None:
            self.acting = None
            self.chosen(None)
            return
        down, up = self.lora_A[slot], self.lora_B[slot]
        if self._dtype == down.dtype and self._place_up is None:  # they are ready as they are
            self._ready = LowRank(down, up, down.detach(), up.detach(), self.scale)
        else:
            self._place_down = _filled(self._place_down, down, self._dtype)
            self._place_up = _filled(self._place_up, up, self._dtype).mul_(self.scale)
            self._ready = LowRank(down, up, self._place_down, self._place_up, 1.0)
        self.acting = self._ready
        self.chosen(self.acting)

    def holds(self, acting: LowRank) -> bool:
        """Whether its values are still there: no other slot was chosen since."""
        return self._ready is not None and acting.down is self._ready.down

    def place_up(self, place: Tensor) -> None:
        """Ready B here, [out, r], instead of in memory of its own."""
        self._place_up = place


@torch.no_grad()
def _filled(place: Tensor | None, value: Tensor, dtype: torch.dtype) -> Tensor:
    if place is None:
        place = torch.empty(value.shape, dtype=dtype, device=value.device)
    return place.copy_(value)


def mark_sharded(parameter: nn.Parameter, dim: int) -> None:
    """Note that the tensor ranks hold slices of this parameter along `dim`. Megatron reads it."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def mark_replicated(parameter: nn.Parameter, *, sequence: bool) -> None:
    """Note that all tensor ranks hold the whole; with `sequence` each sees only its tokens.

    Megatron then sums this parameter's gradient over the tensor ranks.
    """
    parameter.sequence_parallel = sequence  # type: ignore[attr-defined]


def partition_of(parameter: Tensor) -> int | None:
    """Dimension along which the tensor ranks share this parameter, or None."""
    if getattr(parameter, "tensor_model_parallel", False):
        return int(parameter.partition_dim)  # type: ignore[attr-defined]
    return None


class PolicyBank(Protocol):
    """Sets of weights that one model can act with."""

    def use(self, slot: str | None) -> contextlib.AbstractContextManager[None]:
        """Act with this slot inside the context; None is the bare base."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Target <- source."""
        ...

    def blend(self, source: str, target: str, keep: float) -> None:
        """Target <- keep * target + (1 - keep) * source."""
        ...


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """A model's adapters by module name. ValueError if it has none."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Adapter)}
    if not found:
        raise ValueError("the model was built without adapters: set policy.mode to lora")
    return found


class AdapterBank:
    """LoRA: four adapters on one frozen base. Nothing of the base is ever copied."""

    def __init__(self, model: nn.Module, switch: Switch) -> None:
        self.switch = switch
        self.adapters = adapters_of(model)

    @contextlib.contextmanager
    def use(self, slot: str | None) -> Iterator[None]:
        """See PolicyBank.use."""
        if slot is not None and slot not in SLOTS:
            raise ValueError(f"no adapter slot {slot!r}: there are {SLOTS}")
        before, self.switch.slot = self.switch.slot, slot
        try:
            yield
        finally:
            self.switch.slot = before

    def _pairs(self, source: str, target: str) -> Iterator[tuple[Tensor, Tensor]]:
        for adapter in self.adapters.values():
            yield adapter.lora_A[source], adapter.lora_A[target]
            yield adapter.lora_B[source], adapter.lora_B[target]

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """See PolicyBank.copy."""
        for value, held in self._pairs(source, target):
            held.copy_(value)

    @torch.no_grad()
    def blend(self, source: str, target: str, keep: float) -> None:
        """See PolicyBank.blend."""
        for value, held in self._pairs(source, target):
            held.lerp_(value, 1 - keep)


class FullBank(nn.Module):
    """Full-weight training: whole copies of the weights. For small models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._live = dict(model.named_parameters())
        self._own = {name: parameter.data for name, parameter in self._live.items()}
        self.slots = nn.ModuleDict()
        for slot in SLOTS[1:]:
            copies = nn.ParameterDict()
            for name, parameter in self._live.items():
                twin = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                dim = partition_of(parameter)
                if dim is not None:
                    mark_sharded(twin, dim)
                copies[name.replace(".", "/")] = twin
            self.slots[slot] = copies

    def _values(self, slot: str) -> dict[str, Tensor]:
        if slot == "current":
            return dict(self._own)
        held = self.slots[slot]
        return {name: held[name.replace(".", "/")] for name in self._live}  # type: ignore[index]

    @contextlib.contextmanager
    def use(self, slot: str | None) -> Iterator[None]:
        """See PolicyBank.use. None is the reference: full training has no bare base."""
        slot = slot or "reference"
        if slot not in SLOTS:
            raise ValueError(f"no weight slot {slot!r}: there are {SLOTS}")
        before = {name: parameter.data for name, parameter in self._live.items()}
        try:
            for name, value in self._values(slot).items():
                self._live[name].data = value.data
            yield
        finally:
            for name, data in before.items():
                self._live[name].data = data

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """See PolicyBank.copy."""
        self.blend(source, target, 0.0)

    @torch.no_grad()
    def blend(self, source: str, target: str, keep: float) -> None:
        """See PolicyBank.blend."""
        held = self._values(target)
        for name, value in self._values(source).items():
            held[name].copy_(torch.lerp(held[name], value, 1 - keep) if keep else value)


def initial_bound(in_dim: int) -> float:
    """Half-width of A's uniform start, kaiming-uniform with a = sqrt(5), as PEFT draws it."""
    return math.sqrt(1 / in_dim)
