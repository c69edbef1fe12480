"""Where the time of a KVPO update goes, stage by stage, for any recipe.

    python -m tools.benchmark examples/wan/longlive_1.3b.yaml --fork 57 --output longlive.json
    torchrun --nproc_per_node 2 -m tools.benchmark RECIPE parallel.branch=2 --output two.json
    python -m tools.benchmark RECIPE --scaling 1,2,4 --output scaling.json

Real updates of the real loop run on random weights unless the recipe names some. Rewards are drawn,
unless --score asks for the recipe's own. Writes the JSON, a Markdown table and a plot beside it.

With --score and reward.service.spawn=true or reward.service.urls the plot shows when each server
scored beside what the run did, and the table how much longer the update is than its longer half:
the run's own work, or the scoring. These are of the last update and of the first rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_kvpo import log, settings
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.seeds import generator
from megatron_kvpo.records import RewardTable, RolloutGroup
from megatron_kvpo.reward.composite import ScoredGroup, Scorer
from megatron_kvpo.routing import draw_plan, legal_forks
from megatron_kvpo.stopwatch import Span, Stopwatch
from megatron_kvpo.train import train_step
from megatron_kvpo.training.metrics import Metrics
from megatron_kvpo.training.run import Run
from megatron_kvpo.training.stages import AWAITING
from tools import benchmark_report, provenance

logger = log.get_logger("megatron_kvpo.tools.benchmark")

_MODULE = "tools.benchmark"

_LARGEST_SEARCH = 10_000
"""Updates looked through for one whose groups all fork at --fork."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. ValueError for a recipe that cannot run so."""
    options = _parse(arguments)
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} must end in .json")
    if options.updates < 1 or options.warmup < 0:
        raise ValueError(
            f"--updates {options.updates} must be at least 1 and --warmup {options.warmup} not "
            "negative"
        )
    found = scaling(options) if options.scaling else measure(options)
    if found is not None:
        benchmark_report.write(found, options.output)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any] | None:
    """One recipe on the ranks there are. The first rank returns the record, the others None."""
    with tempfile.TemporaryDirectory() as folder:
        config = quiet(load_config(options.recipe, options.overrides), Path(folder))
        run = Run.start(config, on_device=True)
        try:
            if not options.score:
                run.stages.scorer = DrawnRewards(run.stages.scorer, decode=options.decode)
            first = first_update(config, options.fork, options.stale, run)
            ceiling = matmul_ceiling(run.ranks.device, config.model.torch_dtype)
            warm = first
            if options.warm_fork is not None:
                warm = first_update(config, options.warm_fork, options.stale, run, "--warm-fork")
            watches = list(updates(run, config, (warm, first), options))[options.warmup :]
            others = stages_of_ranks(run.ranks, watches)
            if not run.first:
                return None
            return record(run, options, watches, ceiling) | others
        finally:
            run.finish(0.0)
            log.setup(run.first)  # the folder of run.log goes


def quiet(config: RunConfig, folder: Path) -> RunConfig:
    """The recipe without evaluation, checkpoints and reports."""
    return dataclasses.replace(
        config, folder=folder, num_updates=_LARGEST_SEARCH,
        evaluation=dataclasses.replace(config.evaluation, prompts=None, every=0),
        checkpoint=dataclasses.replace(config.checkpoint, every=0, resume=False),
        log=dataclasses.replace(config.log, wandb="disabled", tensorboard=False,
                                costs=False, samples_every=0, report=False),
        optimizer=dataclasses.replace(config.optimizer, warmup_updates=0),
    )  # fmt: skip


class DrawnRewards:
    """Stands in for a scorer: its scores are drawn; `decode` has it decode in front of them."""

    def __init__(self, scorer: Scorer, *, decode: bool) -> None:
        self._scorer, self._decode = scorer, decode

    def send_group(self, group: RolloutGroup) -> ScoredGroup:
        """See Scorer.send_group."""
        components = self._scorer.components
        if self._decode:
            for _ in self._scorer.decoded(group.latent_NFCHW, group.plan.fork_frame):
                pass
        shape = (len(components), len(group.sequences))
        rng = generator("benchmark", group.prompt.index)
        local, whole = (
            torch.randn(shape, generator=rng).to(group.latent_NFCHW.device) for _ in range(2)
        )
        return ScoredGroup(RewardTable(
            components=components, weights=tuple(self._scorer.config.weights.values()),
            local_KN=local, global_KN=whole,
        ))  # fmt: skip


def first_update(
    config: RunConfig, fork: int | None, stale: bool, run: Run, option: str = "--fork"
) -> int:
    """An update, not the very first, whose groups all fork at `fork`, which `option` asked for.

    `stale`: one in which the sampling policy is not the current one, so that it is replayed too.
    """
    legal = legal_forks(config.stream, config.routing)
    period = config.policy.rollouts_per_policy_sync
    if fork is not None and fork not in legal:
        raise ValueError(f"{option} {fork} is no legal fork: {legal}")
    if stale and period == 1:
        raise ValueError("--stale: policy.rollouts_per_policy_sync 1 never samples by old weights")
    for update in range(period + stale, _LARGEST_SEARCH, period):
        if fork is None or forks_of(config, run, update) == {fork}:
            return update
    raise ValueError(f"no update of the first {_LARGEST_SEARCH} forks at {fork} in all groups")


def forks_of(config: RunConfig, run: Run, update: int) -> set[int]:
    """Where the groups of an update fork."""
    return {
        draw_plan(
            config.stream, config.routing, (config.seed, update, prompt.index), prompt.video_frames
        ).fork_frame
        for prompt in run.stages.prompts.groups_of(update)
    }


def updates(
    run: Run, config: RunConfig, numbers: tuple[int, int], options: argparse.Namespace
) -> Iterator[Stopwatch]:
    """Two updates again and again: one to warm up, then the one that counts. The weights move."""
    warm, first = numbers
    total = options.warmup + options.updates
    with Metrics(config, run.first) as metrics, log.Progress(total, first=False) as progress:
        run.update = warm if options.warmup else -1  # its alarms sound in the first one only
        for number in range(total):
            update = warm if number < options.warmup else first
            tracing = options.trace is not None and number == total - 1 and run.first
            with traced(options.trace) if tracing else nullcontext(), Stopwatch() as watch:
                train_step(run, update, metrics, progress)
            run.update = -1
            logger.info("update %d of %d: %.2f s", number + 1, total, watch.seconds)
            yield watch


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Write a profiler trace of what happens inside, for chrome://tracing, and a table (.txt)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=key, row_limit=40)
    path.with_suffix(".txt").write_text(table + "\n")


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product, the best of several: what is reachable here."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - started) / 1e12)
    return best


def record(
    run: Run, options: argparse.Namespace, watches: Sequence[Stopwatch], ceiling: float
) -> dict[str, Any]:
    """What is written: each stage's seconds, work and share of the ceiling, and when it ran."""
    stages = {}
    for name in watches[0].stages:
        seconds = [watch.stages[name].seconds for watch in watches]
        work = watches[0].stages[name]
        stages[name] = _summary(seconds, work.flops, work.passes, ceiling)
    whole = _summary([watch.seconds for watch in watches],
                     sum(s.flops for s in watches[0].stages.values()),
                     sum(s.passes for s in watches[0].stages.values()), ceiling)  # fmt: skip
    return {
        "name": options.output.stem,
        **provenance.made_by(_MODULE, run.ranks.world),
        "matmul_ceiling_tflops": ceiling,
        "fork": options.fork,
        "warmup": options.warmup,
        "update": whole,
        "stages": stages,
        **timeline(watches[-1].spans),
        **_memory(run.ranks),
        "config": settings.to_mapping(run.config),
    }


def stages_of_ranks(ranks: Ranks, watches: Sequence[Stopwatch]) -> dict[str, Any]:
    """Median seconds of each stage on every rank, where there are several. Collective."""
    own = {
        name: sorted(watch.stages[name].seconds for watch in watches)[len(watches) // 2]
        for name in watches[0].stages
    }
    found: list[dict[str, float] | None] = [None] * ranks.world
    dist.all_gather_object(found, own)
    return {"ranks": found} if ranks.world > 1 else {}


def _summary(seconds: Sequence[float], flops: float, passes: int, ceiling: float) -> dict[str, Any]:
    ordered = sorted(seconds)
    median = ordered[len(ordered) // 2]
    rate = flops / median / 1e12 if median else 0.0
    return {
        "repeats": len(ordered), "min_s": ordered[0], "median_s": median, "max_s": ordered[-1],
        "tflop": flops / 1e12, "passes": passes, "tflops": rate, "share": rate / ceiling,
    }  # fmt: skip


def timeline(spans: Sequence[Span]) -> dict[str, Any]:
    """When each lane did what and, if others scored, how much of it went on beside the run.

    of_the_longer: seconds of the update over those of its longer half, which are the run without
    its waits for scores, and the busiest scorer. 1 is all that overlapping can reach.
    """
    lanes: dict[str, list[Span]] = {"run": []}
    for span in sorted(spans, key=lambda span: span.start_s):
        lanes.setdefault(span.lane, []).append(span)
    rows = {
        lane: [[s.name, *_ends(s)] for s in own if _ends(s)[0] < _ends(s)[1]]
        for lane, own in lanes.items()
    }
    found: dict[str, Any] = {"timeline": {"lanes": rows}}
    run = lanes.pop("run")
    if lanes:
        update_s = busy_seconds(run)
        run_s = update_s - busy_seconds([span for span in run if span.name == AWAITING])
        scoring_s = max(busy_seconds(own) for own in lanes.values())
        found["overlap"] = {"run_s": run_s, "scoring_s": scoring_s, "update_s": update_s,
                            "of_the_longer": update_s / max(run_s, scoring_s)}  # fmt: skip
    return found


def _ends(span: Span) -> tuple[float, float]:
    return round(span.start_s, 4), round(span.stop_s, 4)


def busy_seconds(spans: Sequence[Span]) -> float:
    """Seconds in which any of these went on."""
    total, until_s = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.stop_s - max(span.start_s, until_s))
        until_s = max(until_s, span.stop_s)
    return total


def _memory(ranks: Ranks) -> dict[str, float]:
    if ranks.device.type != "cuda":
        return {}
    return {
        "peak_memory_gib": torch.cuda.max_memory_allocated(ranks.device) / 2**30,
        "reserved_memory_gib": torch.cuda.max_memory_reserved(ranks.device) / 2**30,
    }


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """The same recipe on 1, 2, ... ranks: one group shared (strong) and a group each (weak)."""
    sizes, runs = options.scaling, []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("strong", "weak"):
            for size in sizes:
                path = Path(folder) / f"{kind}_{size}.json"
                groups = size if kind == "weak" else 1
                layout = f"parallel.branch={size if kind == 'strong' else 1}"
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", str(size), "-m", _MODULE,
                           str(options.recipe), *options.overrides, layout,
                           f"policy.groups_per_update={groups}", "--output", str(path),
                           "--updates", str(options.updates), "--warmup", str(options.warmup),
                           *(["--fork", str(options.fork)] if options.fork is not None else []),
                           *(["--decode"] if options.decode else []),
                           *(["--score"] if options.score else []),
                           *(["--stale"] if options.stale else [])]  # fmt: skip
                logger.info("%s", shlex.join(command))
                subprocess.run(command, check=True)
                runs.append({"kind": kind, "ranks": size, **json.loads(path.read_text())})
    return {"name": options.output.stem, **provenance.made_by(_MODULE, max(sizes)), "runs": runs}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--updates", type=int, default=3, help="that count")
    parser.add_argument("--warmup", type=int, default=1,
                        help="that do not; 0 counts the compiling of kernels, too")  # fmt: skip
    parser.add_argument("--fork", type=int, help="latent frame; default: as it is drawn")
    parser.add_argument("--warm-fork", type=int, help="of the warm-up; a late one is short")
    parser.add_argument("--stale", action="store_true", help="with a replay by the old policy")
    parser.add_argument("--decode", action="store_true", help="decode every row, too")
    parser.add_argument("--score", action="store_true", help="by the recipe's rewards")
    parser.add_argument("--trace", type=Path, help="profiler trace of the last update, .json")
    parser.add_argument("--scaling", type=_numbers, help="ranks, for example 1,2,4")
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    log.run_command(main, logger)
