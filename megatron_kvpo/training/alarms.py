"""What must hold at every start, checked on the first update's own data. Wrongness is loud."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import branch_log_probs
from megatron_kvpo.config import AlarmsConfig
from megatron_kvpo.parallel.collect import all_equal, largest
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import Energies
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.rollout.sampler import encode_segment
from megatron_kvpo.training.stages import Stages

PROBE = 1e-2
"""Size of the change made to the current weights to see whether the output follows."""


class AlarmError(ValueError):
    """A start-up check failed; the run stops."""


def check_start(
    config: AlarmsConfig, stages: Stages, update: int, groups: Sequence[SampledGroup],
    old: Energies, current: Energies,
) -> dict[str, float]:  # fmt: skip
    """Ratio 1, anchor energy 0, adapter active, prefix pages equal. Returns the figures seen.

    `old` and `current` are replays by those policies. The ratio is taken to one more replay by the
    sampling policy: of the current one, or of the old one if the run resumes between two syncs and
    the current policy has moved.

    Raises:
        AlarmError: names the check, the figure, the limit and what it means.
    """
    if not config.enabled:
        return {}
    first = current if stages.policy.is_synced(update) else old
    current, old = stages.energies(update, groups, "old"), first
    temperature = stages.config.energy.temperature
    ratio_PG = (
        branch_log_probs(current.branch_PG, temperature)
        - branch_log_probs(old.branch_PG, temperature)
    ).exp()
    figures = {
        "ratio": float((ratio_PG - 1).abs().max()) * temperature,
        "anchor_energy": float(old.anchor_P.max()),
        "adapter": _movement(stages, groups[0]),
        "prefix_pages": _prefix_difference(stages.ranks, groups),
    }
    figures = _worst(figures, stages.ranks)
    if not figures["ratio"] <= config.ratio_tolerance:
        raise AlarmError(
            "alarm ratio: before the first update a branch's ratio is off 1 by "
            f"{figures['ratio'] / temperature:.3g}, the limit is "
            f"{config.ratio_tolerance / temperature:.3g}: rollout and replay score different laws"
        )
    if not figures["anchor_energy"] <= config.energy_tolerance:
        raise AlarmError(
            f"alarm anchor energy: the anchor's energy under the weights that sampled it is "
            f"{figures['anchor_energy']:.3g} (limit {config.energy_tolerance:.3g}): the replay's "
            "context is not the rollout's"
        )
    if not figures["adapter"] > 0:
        raise AlarmError(
            "alarm adapter: the output does not move when the trained weights do: the adapter is "
            "loaded but not active"
        )
    if figures["prefix_pages"] != 0:
        raise AlarmError(
            f"alarm prefix pages: branches disagree on their shared prefix by "
            f"{figures['prefix_pages']:.3g} (limit 0): a rank drew other noises or weights"
        )
    return figures


def check_gradients(config: AlarmsConfig, stages: Stages) -> float:
    """Gradients equal on all replicas after the reduction. Call between finalize and step.

    With optimizer.distributed it is the weights: see Optimizer.check_gradients_equal.

    Raises:
        AlarmError: they differ.
    """
    if not config.enabled:
        return 0.0
    difference = stages.policy.optimizer.check_gradients_equal()
    if difference != 0:
        raise AlarmError(
            "alarm gradients: reduced gradients (weights, with optimizer.distributed) differ "
            f"between data ranks by {difference:.3g} (limit 0): they are not averaged"
        )
    return difference


@torch.no_grad()
def _movement(stages: Stages, sampled: SampledGroup) -> float:
    """How far the velocity moves when the current weights are changed and then put back."""
    trained = stages.policy.trained()
    kept = {name: p.detach().clone() for name, p in trained.items()}
    before = _first_velocity(stages, sampled)
    for name, p in trained.items():
        p.add_(PROBE * noise(tuple(p.shape), "alarm", name, device=p.device))
    after = _first_velocity(stages, sampled)
    for name, p in trained.items():
        p.copy_(kept[name])
    return float((after - before).abs().max())


def _first_velocity(stages: Stages, sampled: SampledGroup) -> Tensor:
    """The current policy's velocity of the anchor's first recorded state."""
    with stages.policy.acting("current"):
        text = encode_segment(
            stages.world.model, stages.encode, [sampled.group.prompt],
            sampled.group.plan.fork_frame,
        )  # fmt: skip
        stream = sampled.prefix.fork(1, text)
        velocity = stream.velocity(sampled.group.trajectory.state_NPTFCHW[-1:, 0, 0], 1.0)
        stream.release()
    return velocity


def _prefix_difference(ranks: Ranks, groups: Sequence[SampledGroup]) -> float:
    """Largest difference of the prefix's pages and latents between branches, on all ranks."""
    worst = 0.0
    for sampled in groups:
        latent = sampled.group.latent_NFCHW[:, : sampled.group.plan.fork_frame]
        worst = max(worst, float((latent - latent[:1]).abs().max()))
        pages = list(sampled.prefix.tables[0].pages.values())
        pool = sampled.prefix.world.pool
        for held in (*pool.key, *pool.value):  # a layer at a time: all of them are gigabytes
            equal, difference = all_equal(held[pages], ranks.branch)
            worst = max(worst, difference if not equal else 0.0)
    return worst


def _worst(figures: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """The worst figure of any rank, so that all ranks stop together."""
    values = largest([v if name != "adapter" else -v for name, v in figures.items()], ranks)
    return {name: v if name != "adapter" else -v for name, v in zip(figures, values, strict=True)}
