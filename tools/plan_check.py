"""Predictions beside what was measured: docs/benchmarks/update and docs/benchmarks/passes.

Rates come from passes only, never from an update. A pass is predicted without its own record.
Where a record's commit did other work than today's code, that work is predicted too, from facts
of that commit that stand below and from the passes that the record counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kvpo import settings
from megatron_kvpo.config import RunConfig
from tools.plan_count import Pass, count, prompts_of
from tools.plan_layouts import CONTEXT_GIB, H100, H200
from tools.plan_memory import (
    GIB,
    Place,
    block_bytes,
    forward_bytes,
    memory,
    page_bytes,
    sequence_bytes,
    static_bytes,
    text_bytes,
    weights_of,
)
from tools.plan_rates import PASSES, Rates, kind_of, load_rates
from tools.plan_time import OTHER_S, decode_seconds, stage_seconds

UPDATES = Path("docs/benchmarks/update")

TIME_BAR, MEMORY_BAR = 0.15, 0.05
"""Largest error of a prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Then:
    """What the code of a commit did otherwise."""

    merged_beside: bool = False
    """The merged copy stays in bfloat16 beside its 8 bits."""

    note: str
    always: bool = False
    """Whether the note is about a figure, not about how the work differs."""


OLDER = {
    "21e7d9b": Then(merged_beside=True, note="the merged copy was held in bfloat16 too"),
    "7edb751": Then(note="before branch ranks shared backward passes and replays evenly"),
    "ee691fa": Then(note="no warm-up: kernels were compiled in the measured time", always=True),
    "49009d1": Then(note="a GPU slower by 19 % in the same passes than others", always=True),
}  # fmt: skip
"""By the beginning of a commit: why its records differ, where they do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One prediction and its measurement."""

    name: str
    commit: str
    device: str
    predicted_s: float
    """By today's code."""

    as_then_s: float
    """By the work that the record counted."""

    measured_s: float
    predicted_gib: float
    as_then_gib: float
    measured_gib: float
    note: str

    @property
    def time_error(self) -> float:
        """Of the prediction of the same work."""
        return self.as_then_s / self.measured_s - 1

    @property
    def memory_error(self) -> float:
        """Of the prediction of the same work; 0 where nothing was measured."""
        return self.as_then_gib / self.measured_gib - 1 if self.measured_gib else 0.0

    @property
    def holds(self) -> bool:
        """Whether both are within the bars."""
        return abs(self.time_error) <= TIME_BAR and abs(self.memory_error) <= MEMORY_BAR


def check_all(updates: Path = UPDATES, passes: Path = PASSES) -> list[Checked]:
    """Every committed record."""
    return check_files([*sorted(updates.rglob("*.json")), *sorted(passes.rglob("*.json"))], passes)


def check_files(paths: Iterable[Path], passes: Path = PASSES) -> list[Checked]:
    """Records of tools.benchmark and tools.benchmark_passes. ValueError for another file."""
    found: list[Checked] = []
    for path in paths:
        record = json.loads(path.read_text())
        if "stages" in record and "config" in record:
            found.append(check_update(path, record, passes))
        elif "passes" in record and "config" in record:
            found += check_passes(path, record, passes)
        else:
            raise ValueError(
                f"{path} is no record of an update or of passes: give one of tools.benchmark or "
                "tools.benchmark_passes"
            )
    return found


def _then(commit: str) -> Then:
    return next((then for key, then in OLDER.items() if commit.startswith(key)), Then(note=""))


def check_update(path: Path, record: dict[str, Any], passes: Path = PASSES) -> Checked:
    """One measured update. ValueError for a fork that was drawn: nobody knows what it did."""
    config = settings.from_mapping(RunConfig, record["config"])
    if record["fork"] is None or config.policy.groups_per_update > 1:
        raise ValueError(f"{path} does not say where its groups fork: measure it with --fork")
    device, then = record["machine"]["device"], _then(record["commit"])
    rates = load_rates(kind_of(device), passes)
    scale = rates.ceiling_tflops / record["matmul_ceiling_tflops"]
    gib, recomputed = _update_memory(config, record["fork"], rates)
    stages = _stages(rates, config, record["fork"], recomputed)
    today, as_then = sum(stages.values()), _as_counted(record, config, stages)
    return Checked(
        name=f"update/{path.stem}", commit=record["commit"][:8], device=kind_of(device),
        predicted_s=today * scale + OTHER_S, as_then_s=as_then * scale + OTHER_S,
        measured_s=record["update"]["median_s"], predicted_gib=gib, as_then_gib=gib,
        measured_gib=record["peak_memory_gib"],
        note=then.note if then.always or today != as_then else "",
    )  # fmt: skip


def _stages(rates: Rates, config: RunConfig, fork: int, recomputed: float) -> dict[str, float]:
    """Of the first rank, whose backward is as long as any."""
    branch, (prompt, *_) = config.parallel.branch, prompts_of(config)
    counted = count(config, prompt, fork, branch)
    found = stage_seconds(rates, config, config.parallel, counted, recomputed)
    rows = -(-(config.routing.num_branches + 1) // branch)
    return found | {"decode": decode_seconds(rates, config, fork, rows)}


def _as_counted(
    record: dict[str, Any], config: RunConfig, stages: dict[str, float]
) -> float:  # fmt: skip
    """Seconds of the passes that the record counted. The busier of two branch ranks counts."""
    (prompt, *_), branch = prompts_of(config), config.parallel.branch
    counted, total = count(config, prompt, record["fork"], branch), 0.0
    for name, seconds in stages.items():
        made, own = counted.rows_of(name), record["stages"].get(name, {}).get("passes", 0)
        if name == "backward" and branch == 2:
            whole = count(config, prompt, record["fork"]).rows_of(name)
            own = max(own, whole - own)
        total += seconds * (own / made if made else 1)
    return total


def _update_memory(config: RunConfig, fork: int, rates: Rates) -> tuple[float, float]:
    """Peak in GiB, and the share of blocks that recompute."""
    prompts, parallel = prompts_of(config), config.parallel
    lent = count(config, prompts[0], fork, parallel.branch).lent
    kind = H200 if rates.gpu == "H200" else H100
    found = memory(config, prompts, Place(
        parallel=parallel, data=1, groups=1, lent=lent,
        limit_gib=parallel.memory_gib or kind.gpu_memory_gib - CONTEXT_GIB,
    ))  # fmt: skip
    return found.peak, found.recomputed


def _merged_gib(config: RunConfig) -> float:
    """The merged copy in the model's type, where 8 bits have taken its place."""
    if not (config.policy.merge and config.model.fp8):
        return 0.0
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, fp8=()))
    families = set(config.model.fp8)
    numbers = sum(w.numel for w in weights_of(whole) if w.layer and w.family in families)
    return numbers * config.model.torch_dtype.itemsize / config.parallel.tensor / GIB


def check_passes(path: Path, record: dict[str, Any], passes: Path = PASSES) -> Iterator[Checked]:
    """Every pass of a record, forward or with its backward, from all the other records.

    One video's block too, but for its memory: the peak beside it is of the whole process.
    """
    config = settings.from_mapping(RunConfig, record["config"])
    device, then = record["machine"]["device"], _then(record["commit"])
    rates = load_rates(kind_of(device), passes, without=path)
    scale = rates.ceiling_tflops / record["matmul_ceiling_tflops"]
    beside = _merged_gib(config) if then.merged_beside else 0.0
    for p in record["passes"]:
        video, graph = p["kind"] == "video_block", p["kind"] == "forward_backward"
        kind = Pass("", p["rows"], config.stream.block_frames, config.stream.window_frames, graph,
                    False)  # fmt: skip
        kinds, more = [kind], 0.0 if video else beside
        note = then.note if more else ""
        if video:  # the last of a block's passes fills pages only
            kinds = [kind] * len(config.stream.steps) + [dataclasses.replace(kind, fills=True)]
        try:
            seconds = sum(rates.pass_s(config, config.parallel, one) for one in kinds) * scale
            alone = graph and not (rates.graphs if p["rows"] > 1 else rates.host_ms)
        except ValueError:
            alone = True
        if alone:  # nothing else tells of its like
            seconds, note = p["median_ms"] / 1e3, "the only record of its kind: no prediction"
        gib = 0.0 if video else _pass_gib(config, p["rows"], graph)
        rows = f"{p['rows']} row{'s' * (p['rows'] > 1)}{', backward' * graph}"
        yield Checked(
            name=f"passes/{path.stem}: {'one video' if video else rows}",
            commit=record["commit"][:8], device=kind_of(device), predicted_s=seconds,
            as_then_s=seconds, measured_s=p["median_ms"] / 1e3, predicted_gib=gib,
            as_then_gib=gib + more,
            measured_gib=0.0 if video else p.get("peak_memory_gib", 0.0), note=note,
        )  # fmt: skip


def _pass_gib(config: RunConfig, rows: int, graph: bool) -> float:
    """Peak of tools.benchmark_passes: its pool has the sink once and each row's other frames."""
    stream, parallel = config.stream, config.parallel
    own = stream.window_frames - stream.block_frames - stream.sink_frames
    pages = stream.sink_frames + rows * own
    total = sum(static_bytes(config, parallel, 1).values())
    total += pages * page_bytes(config.model, parallel)
    total += (rows + 1) * text_bytes(config.model, parallel)
    total += rows * sequence_bytes(config)[0] * stream.block_frames / stream.num_frames
    if not graph:
        return (total + forward_bytes(config, parallel, rows)) / GIB
    return (total + (config.model.num_layers + 0.5) * block_bytes(config, parallel, rows)) / GIB


def table(found: Sequence[Checked]) -> str:
    """Markdown: one line a prediction."""
    lines = [
        "| record | commit | GPU | s today | s of that work | s measured | error | GiB | GiB "
        "measured | error | within | why |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.name} | {c.commit} | {c.device} | {c.predicted_s:.4g} | {c.as_then_s:.4g} "
        f"| {c.measured_s:.4g} | {c.time_error:+.1%} | {_memory_cells(c)} "
        f"| {'yes' if c.holds else '**no**'} | {c.note} |"
        for c in found
    ]
    return "\n".join(lines) + "\n"


def _memory_cells(checked: Checked) -> str:
    if not checked.measured_gib:
        return " |  | "
    return f"{checked.as_then_gib:.1f} | {checked.measured_gib:.1f} | {checked.memory_error:+.1%}"


def to_mapping(checked: Checked) -> dict[str, Any]:
    """For JSON, its errors and verdict included."""
    own = dataclasses.asdict(checked)
    return own | {"time_error": checked.time_error, "memory_error": checked.memory_error,
                  "holds": checked.holds}  # fmt: skip
