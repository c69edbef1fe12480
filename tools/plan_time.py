"""Seconds of an update on a layout: passes, what travels, and who waits for whom."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_kvpo.config import ParallelConfig, RunConfig
from megatron_kvpo.parallel.collect import shares
from megatron_kvpo.records import Prompt
from megatron_kvpo.routing import legal_forks
from tools.plan_count import Counted, Pass, count
from tools.plan_layouts import Layout, Machines
from tools.plan_memory import sequence_bytes, static_bytes, trained_numbers
from tools.plan_rates import Rates, family_of

REWARDS = Path("docs/benchmarks/rewards/h100")

LINK_SHARE = 0.69
"""Of a link's speed that collectives reach: two H200 have 312 of 450 GB/s (docs/parallelism.md)."""

STEP_S_A_NUMBER = 1e-10
"""Of AdamW and the average, a trained number: .035 s of 350 million (docs/benchmarks/update)."""

OTHER_S = 0.2
"""Of an update that is no stage: logging, small tensors, texts (docs/benchmarks/update)."""

DISK_GB_S = 1.0
"""An assumption: what one rank writes of a checkpoint."""


@dataclass(frozen=True, slots=True)
class Group:
    """One group's update on the ranks of one data rank."""

    stages: dict[str, float]
    """Seconds of the rank that is last, each stage's."""

    before: float
    """Until the branch ranks meet, on the one that is last."""

    mean_before: float
    """The same on the mean."""

    backward: float
    scoring: float
    """On a server, beside the run; or in the run."""

    @property
    def seconds(self) -> float:
        """From begin to end, a server's scores awaited."""
        return self.before + self.backward


def stage_seconds(
    rates: Rates, config: RunConfig, parallel: ParallelConfig, counted: Counted,
    recomputed: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Each stage's seconds on one rank. `recomputed`: share of the blocks, under a graph."""
    found = dict.fromkeys(counted.stages, 0.0)
    for kind, times in counted.passes.items():
        found[kind.stage] += times * rates.pass_s(config, parallel, kind)
        if kind.graph and recomputed:
            again = Pass(kind.stage, kind.rows, kind.frames, kind.seen, False, False)
            found[kind.stage] += times * recomputed * rates.pass_s(config, parallel, again)
    return found


def decode_seconds(rates: Rates, config: RunConfig, fork: int, rows: int) -> float:
    """Wan's decoder over a rank's rows; what is before the fork once. 0 without a VAE."""
    if config.codec.vae is None:
        return 0.0
    stream = config.stream
    latents = fork + rows * (stream.num_frames - fork)
    return latents / stream.block_frames * rates.decode_ms / 1e3


def scoring_costs(config: RunConfig, folder: Path = REWARDS) -> tuple[float, float]:
    """Seconds that a group's clips take and GiB held, of the reward models that were measured."""
    seconds = gib = 0.0
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for part in record["rewards"]:
            if set(part["components"]) & set(config.reward.weights):
                seconds += part["median_s"]
                gib += part["peak_memory_gib"]
    return seconds, gib


def scores_elsewhere(config: RunConfig) -> bool:
    """Whether servers score beside the run."""
    return bool(config.reward.service.urls or config.reward.service.spawn)


def group_seconds(
    rates: Rates, config: RunConfig, layout: Layout, prompt: Prompt, fork: int, *,
    stale: bool = False, recomputed: float = 0.0,
) -> Group:  # fmt: skip
    """A group that forks at `fork`. Branch ranks meet after their replays and after backward."""
    parallel, branch = layout.parallel, layout.parallel.branch
    parts = shares(config.routing.num_branches + 1, branch)
    scoring = scoring_costs(config)[0]
    ranks = []
    for rank in sorted({0, min(1, branch - 1), branch - 1}):  # the others do as the last
        counted = count(config, prompt, fork, branch, rank, stale=stale)
        stages = stage_seconds(rates, config, parallel, counted, recomputed)
        if config.codec.vae is not None:
            stages["decode"] = decode_seconds(rates, config, fork, len(parts[rank]))
        own = scoring * len(parts[rank]) / (config.routing.num_branches + 1)
        if own and not scores_elsewhere(config):
            stages["reward"] = own
        elif own:  # judges have until the replays end
            stages["await scores"] = max(0.0, own - stages["replay"])
        ranks.append(stages)
    sums = [sum(s.values()) - s["backward"] for s in ranks]
    last = ranks[sums.index(max(sums))]
    weights = [
        1,
        *([1] if branch > 2 else []),
        *([branch - min(2, branch - 1)] if branch > 1 else []),
    ]
    mean = sum(w * s for w, s in zip(weights, sums, strict=True)) / sum(weights)
    backward = max(s["backward"] for s in ranks)
    return Group({**last, "backward": backward}, max(sums), mean, backward, scoring)


@dataclass(frozen=True, slots=True)
class Update:
    """What an update is expected to take."""

    seconds: float
    stages: dict[str, float]
    """Means over forks of the rank that is last, for all groups of a data rank; then what travels
    and what waits."""

    lost: dict[str, float]
    """Seconds against an even share of the work of one rank, by cause."""


def update_seconds(
    rates: Rates, config: RunConfig, topology: Machines, layout: Layout,
    prompts: Sequence[Prompt], *, forks: Sequence[int] | None = None, recomputed: float = 0.0,
) -> Update:  # fmt: skip
    """Expected over the prompts, their legal forks and the updates between two syncs.

    Data ranks draw different forks, unless the recipe draws one for all, and meet once, at the
    gradients: the longest counts.
    """
    one_fork = config.routing.forks == "per_update"
    times: dict[tuple[bool, int], list[tuple[float, float]]] = {}
    total: dict[str, float] = {}
    uneven = 0.0
    for weight, prompt, fork, stale in cases(config, prompts, forks):
        group = group_seconds(rates, config, layout, prompt, fork, stale=stale,
                              recomputed=recomputed)  # fmt: skip
        together = (stale, fork if one_fork else 0)
        times.setdefault(together, []).append((group.seconds, weight))
        uneven += weight * (group.before - group.mean_before)
        for name, seconds in group.stages.items():
            total[name] = total.get(name, 0.0) + weight * seconds
    groups = config.policy.groups_per_update // layout.data
    mean = groups * sum(seconds * weight for own in times.values() for seconds, weight in own)
    longest = 0.0
    for own in times.values():  # what all groups of an update have in common
        chance = sum(weight for _, weight in own)
        drawn = [(seconds, weight / chance) for seconds, weight in own]
        longest += chance * expected_longest(drawn, groups, layout.data)
    travels = travel_seconds(config, topology, layout)
    stages = {name: groups * seconds for name, seconds in total.items()}
    stages |= {"others' forks": longest - mean, **travels, "other": OTHER_S}
    branch = layout.parallel.branch
    lost = {
        "the prefix on every branch rank": stages["prefix"] * (1 - 1 / branch),
        "uneven branch ranks": groups * uneven,
        "forks that differ": longest - mean,
        "exchanges of model ranks": _exchanged(rates, config, layout, stages),
        "gradients and trajectories": travels["all-reduce"] + travels["gather"],
        "step, checkpoint, other": travels["step"] + travels["checkpoint"] + OTHER_S,
    }
    return Update(longest + sum(travels.values()) + OTHER_S, stages, lost)


def cases(
    config: RunConfig, prompts: Sequence[Prompt], forks: Sequence[int] | None
) -> Iterator[tuple[float, Prompt, int, bool]]:  # fmt: skip
    """(probability, prompt, fork, whether its update is stale) of what a group may be."""
    period = config.policy.rollouts_per_policy_sync
    kinds = [(1 / period, False)] + [((period - 1) / period, True)] * (period > 1)
    for prompt in prompts:
        legal = legal_forks(config.stream, config.routing, prompt.video_frames)
        if forks is not None and (wrong := sorted(set(forks) - set(legal))):
            raise ValueError(f"forks {wrong} are not legal for prompt {prompt.index}: {legal}")
        chosen = legal if forks is None else list(forks)
        for fork, (share, stale) in itertools.product(chosen, kinds):
            yield share / len(prompts) / len(chosen), prompt, fork, stale


def expected_longest(times: Sequence[tuple[float, float]], groups: int, ranks: int) -> float:
    """Mean over draws of the longest rank, each with the sum of so many independent groups.

    `times` are (seconds, probability); sums are kept to 10 ms.
    """
    sums = {0.0: 1.0}
    for _ in range(groups):
        nxt: dict[float, float] = {}
        for (a, p), (b, q) in itertools.product(sums.items(), times):
            key = round(a + b, 2) if groups > 1 else a + b
            nxt[key] = nxt.get(key, 0.0) + p * q
        sums = nxt
    found = below = 0.0
    for seconds, probability in sorted(sums.items()):
        upto = below + probability
        found += seconds * (min(1.0, upto) ** ranks - below**ranks)
        below = min(1.0, upto)
    return found


def travel_seconds(config: RunConfig, topology: Machines, layout: Layout) -> dict[str, float]:
    """Gradients, trajectories and what follows, once an update. Nothing of it overlaps."""
    parallel = layout.parallel
    replicas = parallel.branch * parallel.context * layout.data
    groups = config.policy.groups_per_update // layout.data
    trained = trained_numbers(config, parallel.tensor)
    rows = config.routing.num_branches + 1
    told = groups * rows * sum(sequence_bytes(config)) * (1 - 1 / parallel.branch)
    reduced = 2 * (1 - 1 / replicas) * trained * 4
    team = layout.model_ranks * parallel.branch
    static = static_bytes(config, parallel, replicas, 1)
    kept = static["weights"] + static["slots"] + 2 * trained * 4
    every = config.checkpoint.every
    return {
        "gather": told / _speed(topology, team) if told else 0.0,
        "all-reduce": reduced / _speed(topology, topology.gpus) if reduced else 0.0,
        "step": trained * STEP_S_A_NUMBER,
        "checkpoint": kept / (DISK_GB_S * 1e9) / every if every else 0.0,
    }


def _speed(topology: Machines, ranks: int) -> float:
    """Bytes a second of a collective over so many neighbouring ranks."""
    link = topology.nvlink_gb_s if ranks <= topology.gpus_per_node else topology.ib_gb_s
    return LINK_SHARE * link * 1e9


def _exchanged(
    rates: Rates, config: RunConfig, layout: Layout, stages: Mapping[str, float]
) -> float:  # fmt: skip
    """What passes of several model ranks take beyond an even part of one's."""
    if layout.model_ranks == 1:
        return 0.0
    one: Any = ParallelConfig()
    stream = config.stream
    kind = Pass("", 4, stream.block_frames, stream.window_frames, False, False)
    shared = rates.pass_s(config, layout.parallel, kind)
    alone = rates.pass_s(config, one, kind) / layout.model_ranks
    passes = sum(
        stages.get(n, 0.0) for n in ("prefix", "recache", "branches", "replay", "backward")
    )
    return passes * (1 - alone / shared)


def is_measured(rates: Rates, config: RunConfig, layout: Layout) -> bool:
    """Whether passes of this layout's family were."""
    wanted = family_of(config, layout.parallel)
    return any(m.family == wanted for m in rates.own)
