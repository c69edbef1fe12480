"""Timing calls on a GPU or a CPU, and what the kernels of a forward pass take alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_kvpo.config import RunConfig
from megatron_kvpo.model.attention import attend
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.seeds import device_generator

Call = Callable[[], object]

BURST = 10
"""Calls of one kernel that are timed together: alone it ends sooner than the next is asked for."""

_TABLE_ROWS = 30


class _Span:
    """How long its `with` block took: between two events of a GPU, or by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._events = [_event(), _event()] if cuda else []
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._mark(0, -1)

    def __exit__(self, *error: object) -> None:
        self._mark(1, 1)

    def _mark(self, which: int, sign: int) -> None:
        if self._events:
            self._events[which].record()
        self._seconds += sign * time.perf_counter()

    @property
    def milliseconds(self) -> float:
        """Of a GPU that has been waited for."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1]))
        return 1000 * self._seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def call_times(
    call: Call, device: torch.device, repeats: int, before: Call | None = None
) -> list[float]:
    """Milliseconds of each call by itself; `before` runs ahead of each and does not count.

    A GPU is kept busy, as in an update: it is waited for once, at the end.
    """
    spans = [_Span(device) for _ in range(repeats)]
    for span in spans:
        if before is not None:
            before()
        with span:
            call()
    wait(device)
    return [span.milliseconds for span in spans]


def host_time(call: Call, device: torch.device, before: Call | None = None) -> float:
    """Milliseconds until a call returns that found the GPU idle and does not wait for it."""
    if before is not None:
        before()
    wait(device)
    started = time.perf_counter()
    call()
    taken = 1000 * (time.perf_counter() - started)
    wait(device)
    return taken


def wait(device: torch.device) -> None:
    """Until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(times: Sequence[float]) -> float:
    """The middle one; of an even number the later of the two."""
    return sorted(times)[len(times) // 2]


def profile(call: Call, device: torch.device, path: Path | None) -> None:
    """One call under the profiler, and the table of what took longest; None writes none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as seen:
        call()
        wait(device)
    if path is None:
        return
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(seen.key_averages().table(sort_by=key, row_limit=_TABLE_ROWS) + "\n")


def floor(
    config: RunConfig, ranks: Ranks, rows: int, *, adapters: bool, warmup: int, repeats: int
) -> dict[str, float]:
    """Milliseconds that the kernels of a forward pass take alone on this rank, all layers.

    `floor_ms` is attention, to the text too, and the layers' matrix products. The `adapters`'
    products stand beside it, for they can be merged.
    """
    parts = dict[str, float]()
    for name, count, call in floor_calls(config, ranks, rows, adapters=adapters):
        taken = _alone(call, ranks.device, warmup, repeats)
        parts[name] = parts.get(name, 0.0) + config.model.num_layers * count * taken
    total = sum(taken for name, taken in parts.items() if name != "adapters_ms")
    return {**parts, "floor_ms": total, "floor_ms_per_row": total / rows}


def _alone(call: Call, device: torch.device, warmup: int, repeats: int) -> float:
    """Milliseconds of one call among others of its kind."""

    def burst() -> None:
        for _ in range(BURST):
            call()

    with torch.no_grad():
        call_times(burst, device, warmup)
        return median(call_times(burst, device, repeats)) / BURST


def floor_calls(
    config: RunConfig, ranks: Ranks, rows: int, *, adapters: bool
) -> list[tuple[str, int, Call]]:
    """What a block computes on this rank: the part it belongs to, how often, one call of it."""
    model, stream = config.model, config.stream
    tokens, keys = (f * model.tokens_per_frame for f in (stream.block_frames, stream.window_frames))
    share, heads = tokens // ranks.context.size, model.num_heads // ranks.tensor.size
    drawn = _Drawn(device_generator(ranks.device, "floor"), model.torch_dtype)
    one = drawn.attention(rows, tokens, keys, (heads // ranks.context.size, model.head_dim))
    other = drawn.attention(rows, share, model.text_length, (heads, model.head_dim))
    calls = [("attention_ms", 1, one), ("text_ms", 1, other)]
    for into, out, count in linear_shapes(config, ranks):
        x_LBD, rank = drawn.normal(share, rows, into), config.policy.lora_rank
        calls.append(("linear_ms", count, drawn.linear(x_LBD, out, bias=True)))
        if adapters:
            narrow = drawn.normal(share, rows, rank)
            calls.append(("adapters_ms", count, drawn.linear(x_LBD, rank, bias=False)))
            calls.append(("adapters_ms", count, drawn.linear(narrow, out, bias=False)))
    return calls


def linear_shapes(config: RunConfig, ranks: Ranks) -> list[tuple[int, int, int]]:
    """Features in, features out and number of a block's linear layers, as this rank has them.

    The keys and values of the text are not among them: they serve many passes.
    """
    dim, wide, parts = config.model.hidden_dim, config.model.ffn_dim, ranks.tensor.size
    return [
        (dim, dim // parts, 4),  # q, k, v; q of the text
        (dim // parts, dim, 2),  # o of both
        (dim, wide // parts, 1),
        (wide // parts, dim, 1),
    ]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Kernels on numbers of their own, laid out in memory as the model's are."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.randn(shape, generator=self.generator, device=device, dtype=self.dtype)

    def attention(self, rows: int, tokens: int, keys: int, heads: tuple[int, int]) -> Call:
        query = self.normal(tokens, rows, *heads)
        key, value = (self.normal(rows, keys, *heads) for _ in range(2))
        return lambda: attend(query, key, value)

    def linear(self, x_LBD: Tensor, out: int, *, bias: bool) -> Call:
        weight, added = self.normal(out, x_LBD.shape[-1]), self.normal(out) if bias else None
        return lambda: nn.functional.linear(x_LBD, weight, added)
