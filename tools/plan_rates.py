"""How long a pass takes, from the single passes that were measured (docs/benchmarks/passes).

A pass is attention, whose operations are counted, and all the rest, which goes by tokens. Both come
from the measured ones. What was not measured is put together from what was, and is noted.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_kvpo import settings
from megatron_kvpo.config import ModelConfig, ParallelConfig, RunConfig
from megatron_kvpo.model.flops import forward_flops, pass_flops
from tools.plan_count import Pass

PASSES = Path("docs/benchmarks/passes")

DECODE = Path("docs/benchmarks/decode")


@dataclass(frozen=True, slots=True)
class Family:
    """What passes of several rows have in common."""

    size: tuple[int, int, int]
    """Hidden size, layers, width of the wide layer."""

    fp8: tuple[str, ...]
    scaling: str
    merged: bool
    tensor: int
    context: int


def family_of(config: RunConfig, parallel: ParallelConfig, *, graph: bool = False) -> Family:
    """Of this recipe's passes: with a graph the bare weight is met, and an adapter beside it."""
    model, merge = config.model, config.policy.merge
    fp8 = () if graph and merge else tuple(sorted(model.fp8))
    scaling = model.fp8_scaling if fp8 else "row"
    size = model.hidden_dim, model.num_layers, model.ffn_dim
    return Family(size, fp8, scaling, merge and not graph, parallel.tensor, parallel.context)


@dataclass(frozen=True, slots=True)
class _Measured:
    """One measured kind of pass without a graph."""

    family: Family
    rows: int
    rest_ms: float
    """Of a row's block: all but attention."""

    attention_ms: float
    attention_tflop: float
    """Of a row on one rank."""

    adapters_ms: float
    """What products of adapters take alone, a row: where they are not merged."""

    linear_ms: float
    """What its products with weights take alone in bfloat16, a row."""


@dataclass(slots=True)
class Rates:
    """Of one kind of GPU. `notes` gathers what had to be put together or taken from another."""

    gpu: str
    ceiling_tflops: float
    """Median over the records: a large product's."""

    own: list[_Measured]
    others: list[_Measured]
    """Of the other kinds of GPU."""

    graphs: dict[int, float]
    """By rows: a pass with its backward over its forward, operations alike."""

    host_ms: float
    """One row forward and backward, which is as fast as the host: 30 layers."""

    decode_ms: float
    """One block of one row through Wan's decoder."""

    notes: set[str] = field(default_factory=set)

    def pass_s(self, config: RunConfig, parallel: ParallelConfig, kind: Pass) -> float:
        """Seconds of one pass of this kind, forward and, with a graph, backward."""
        family = family_of(config, parallel, graph=kind.graph)
        model, stream = config.model, config.stream
        blocks = kind.rows * kind.frames / stream.block_frames
        tokens, tpf = kind.frames * model.tokens_per_frame, model.tokens_per_frame
        attention = forward_flops(model, tokens, kind.seen * tpf)["attention"] * kind.rows / 1e12
        ranks = family.tensor * family.context
        seconds = attention / ranks / self.attention(family)
        seconds += blocks * self.rest_ms(family, blocks) / 1e3
        if kind.fills:
            seconds *= 1 - 1 / model.num_layers
        if not kind.graph:
            return seconds
        rank = config.policy.lora_rank
        ratio = pass_flops(_kept(model), tokens, kind.seen * tpf, rank, graph=True) / pass_flops(
            model, tokens, kind.seen * tpf, rank
        )
        least = self.host_ms * model.num_layers / 30 / 1e3
        return max(seconds * ratio * self.graphs[min(2, max(self.graphs))], least)

    def attention(self, family: Family) -> float:
        """TFLOP/s of attention on one rank."""
        sized = [m for m in self.own if m.family.size == family.size]
        ranks = family.tensor, family.context
        alike = [m for m in sized if (m.family.tensor, m.family.context) == ranks]
        found = alike or sized or self.own
        return statistics.median(m.attention_tflop / m.attention_ms * 1e3 for m in found)

    def rest_ms(self, family: Family, rows: float) -> float:
        """Milliseconds of a row's block but for attention, in a pass of so many."""
        if family.tensor * family.context == 1:
            return self._alone(family, rows)
        found = _points(self.own, family) or self._noted(_points(self.others, family), family)
        if found:
            return _between(found, rows)
        tensor, context = family.tensor, family.context
        alone = self._alone(family, rows) / (tensor * context)
        if tensor > 1:
            volume = (tensor - 1) / tensor * 2
            alone += self._exchange(family, tensor=2) * volume / context
        if context > 1:
            volume = (context - 1) / context**2 * 4
            alone += self._exchange(family, context=2) * volume / tensor
        self.notes.add(f"{_named(family)}: put together from one GPU and the exchanges of two")
        return alone

    def _alone(self, family: Family, rows: float) -> float:
        single = Family(family.size, family.fp8, family.scaling, family.merged, 1, 1)
        found = _points(self.own, single) or self._noted(_points(self.others, single), single)
        if found:
            return _between(found, rows)
        merged = Family(family.size, (), "row", True, 1, 1)
        if single == merged:
            return self._wider(family, rows)
        base = self._alone(merged, rows)
        if not family.fp8:  # adapters beside the weights
            adapters = [m.adapters_ms for m in (*self.own, *self.others) if m.family == merged]
            self.notes.add(f"{_named(single)}: the merged pass and the adapters' products alone")
            return base + statistics.median(adapters)
        known = [m.family for m in (*self.own, *self.others)
                 if m.family.fp8 == family.fp8 and m.family.merged == family.merged
                 and m.family.scaling == family.scaling and m.family.tensor == 1]  # fmt: skip
        if not known:
            raise ValueError(
                f"no pass with model.fp8 {list(family.fp8)}, policy.merge {family.merged} was "
                f"measured: add one to {PASSES} (tools.benchmark_passes)"
            )
        like = known[0]
        bare = self._alone(Family(like.size, (), "row", True, 1, 1), rows)
        self.notes.add(f"{_named(single)}: bfloat16's, less in the measure of another size")
        return base * self._alone(like, rows) / bare

    def _wider(self, family: Family, rows: float) -> float:
        """Of a size that was never measured: by its linear operations."""
        known = [m.family for m in self.own if m.family.merged and not m.family.fp8]
        if not known:
            raise ValueError(f"no merged pass was measured: add one to {PASSES}")
        like = known[0]
        self.notes.add(f"{_named(family)}: from another size, by products and by numbers a token")
        linear = statistics.median(m.linear_ms for m in self.own if m.family == like)
        (dim, layers, wide), (known_dim, known_layers, known_wide) = family.size, like.size
        deep = layers / known_layers
        products = deep * dim * (3 * dim + wide) / (known_dim * (3 * known_dim + known_wide))
        rest = self._alone(like, rows) - linear
        return linear * products + rest * deep * dim / known_dim

    def _exchange(self, family: Family, tensor: int = 1, context: int = 1) -> float:
        """What two ranks lose against half of one: a row's block, milliseconds."""
        for measured in (*self.own, *self.others):
            f = measured.family
            if (f.tensor, f.context) == (tensor, context) and f.size == family.size:
                bare = self._alone(f, measured.rows) / (tensor * context)
                return max(0.0, measured.rest_ms - bare)
        for measured in (*self.own, *self.others):
            f = measured.family
            if (f.tensor, f.context) == (tensor, context):
                bare = self._alone(f, measured.rows) / (tensor * context)
                scale = family.size[0] * family.size[1] / (f.size[0] * f.size[1])
                return max(0.0, measured.rest_ms - bare) * scale
        raise ValueError(
            f"no pass over tensor {tensor}, context {context} was measured: add one to {PASSES}"
        )

    def _noted(self, found: list[_Measured], family: Family) -> list[_Measured]:
        if found:
            self.notes.add(f"{_named(family)}: measured on another kind of GPU")
        return found


def _kept(model: ModelConfig) -> ModelConfig:
    """The same without recomputation, whose time is reckoned apart."""
    return dataclasses.replace(model, recompute=False)


def _named(family: Family) -> str:
    parts = [f"{family.size[0]} x {family.size[1]}", "+".join(family.fp8) or "bfloat16",
             "merged" if family.merged else "adapter beside"]  # fmt: skip
    parts += [f"{axis} {n}" for axis, n in (("tensor", family.tensor), ("context", family.context))
              if n > 1]  # fmt: skip
    return ", ".join(parts)


def _points(measured: Iterable[_Measured], family: Family) -> list[_Measured]:
    return [m for m in measured if m.family == family]


def _between(found: Sequence[_Measured], rows: float) -> float:
    """Between the measured numbers of rows, straight in 1 / rows; outside them the nearest."""
    by_rows: dict[int, list[float]] = {}
    for one in found:
        by_rows.setdefault(one.rows, []).append(one.rest_ms)
    points = sorted((n, statistics.mean(ms)) for n, ms in by_rows.items())
    below = [p for p in points if p[0] <= rows] or points[:1]
    above = [p for p in points if p[0] >= rows] or points[-1:]
    (low, low_ms), (high, high_ms) = below[-1], above[0]
    if low >= high:
        return low_ms
    part = (1 / rows - 1 / high) / (1 / low - 1 / high)
    return high_ms + part * (low_ms - high_ms)


def kind_of(device: str) -> str:
    """`H100` of `NVIDIA H100 80GB HBM3`. ValueError for what no pass was measured on."""
    for name in ("H100", "H200"):
        if name in device:
            return name
    raise ValueError(f"no pass was measured on {device!r}: there are records of H100 and H200")


def load_rates(gpu: str, folder: Path = PASSES, without: Path | None = None) -> Rates:
    """Rates of a kind of GPU from the records under `folder`. ValueError if there are none."""
    paths = [path for path in sorted(folder.rglob("*.json")) if path != without]
    records = [json.loads(path.read_text()) for path in paths]
    kinds = [kind_of(record["machine"]["device"]) for record in records]
    if gpu not in kinds:
        raise ValueError(f"{folder} holds no pass of {gpu}, only of {sorted(set(kinds))}")
    own = [r for r, kind in zip(records, kinds, strict=True) if kind == gpu]
    other = [r for r, kind in zip(records, kinds, strict=True) if kind != gpu]
    measured = [m for record in own for m in _measured(record)]
    rates = Rates(
        gpu=gpu, ceiling_tflops=statistics.median(r["matmul_ceiling_tflops"] for r in own),
        own=measured, others=[m for record in other for m in _measured(record)],
        graphs={}, host_ms=0.0, decode_ms=_decode_ms(records),
    )  # fmt: skip
    _add_graphs(rates, own, other)
    return rates


def _measured(record: dict[str, Any]) -> list[_Measured]:
    config = settings.from_mapping(RunConfig, record["config"])
    model, stream, tpf = config.model, config.stream, config.model.tokens_per_frame
    family = family_of(config, config.parallel)
    ranks = family.tensor * family.context
    tokens, keys = stream.block_frames * tpf, stream.window_frames * tpf
    tflop = forward_flops(model, tokens, keys)["attention"] / 1e12 / ranks
    found = []
    for p in record["passes"]:
        if "floor" not in p:
            continue
        rows, floor = p["rows"], p["floor"]
        found.append(_Measured(
            family, rows, (p["median_ms"] - floor["attention_ms"]) / rows,
            floor["attention_ms"] / rows, tflop, floor["adapters_ms"] / rows,
            floor["linear_ms"] / rows,
        ))  # fmt: skip
    alone = [p for p in record["passes"] if p["kind"] == "video_block"]
    if found and alone and not any(m.rows == 1 for m in found):
        passes = len(stream.steps) + 1 - 1 / model.num_layers
        like = found[0]
        for p in alone:
            rest = p["median_ms"] / passes - like.attention_ms
            found.append(dataclasses.replace(like, rows=1, rest_ms=rest))
    return found


def _add_graphs(
    rates: Rates, own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]
) -> None:
    """How much slower passes with a backward are than their operations say; a host's own time."""
    for record in (*own, *other):
        config = settings.from_mapping(RunConfig, record["config"])
        frames, seen = config.stream.block_frames, config.stream.window_frames
        for p in record["passes"]:
            if p["kind"] != "forward_backward":
                continue
            if p["rows"] == 1:
                rates.host_ms = rates.host_ms or p["median_ms"]
            elif p["rows"] not in rates.graphs:
                kind = Pass("", p["rows"], frames, seen, True, False)
                rates.graphs[p["rows"]] = 1.0
                ideal = rates.pass_s(config, config.parallel, kind)
                rates.graphs[p["rows"]] = p["median_ms"] / 1e3 / ideal


def _decode_ms(records: Sequence[dict[str, Any]]) -> float:
    """Of the fastest decoder: its own folder's if it is there."""
    held = [json.loads(path.read_text()) for path in sorted(DECODE.rglob("*.json"))]
    found = [p["decode_ms"] for r in (*held, *records) for p in r["passes"] if "decode_ms" in p]
    return min(found, default=0.0)
