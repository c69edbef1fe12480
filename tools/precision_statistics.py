"""What separates two traces of the same groups: figures with their standard errors over groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import branch_log_probs
from megatron_kvpo.algorithm.loss import energy_weights
from megatron_kvpo.config import RunConfig
from megatron_kvpo.records import RolloutGroup

Figure = dict[str, float | None]
"""`value` and `standard_error`; None where it is not defined, as the error of one group."""


class Move(NamedTuple):
    """A shift of every trained number by as much as so many steps of AdamW move it at most."""

    along: Literal["gradient", "chance"]
    """`gradient`: down the yardstick's, by its sign, as AdamW's first step goes; all groups' shifts
    then add up. `chance`: each number up or down as it falls."""

    rate: float
    steps: int

    @property
    def size(self) -> float:
        """Of the shift."""
        return self.rate * self.steps


@dataclass(frozen=True, slots=True)
class Replayed:
    """One group under one policy."""

    energy_NT: Tensor
    """Of each sequence by denoising step, the anchor last."""

    velocity_NPTFCHW: Tensor
    """P counts blocks."""

    @property
    def branch_G(self) -> Tensor:
        """Energies of the branches."""
        return self.energy_NT[:-1].sum(dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupTrace:
    """What one mode makes of one group. On the CPU."""

    group: RolloutGroup
    """As the mode rolled it out itself."""

    own_NT: Tensor
    """Energies of that rollout by denoising step."""

    drifted: Replayed
    """The yardstick's states and velocities, behind the prefix that this mode rolled out."""

    common: Replayed
    """The same behind the yardstick's prefix, whose cache this mode has filled."""

    advantage_G: Tensor
    gradient: Tensor
    """Of the loss of the common group, on policy, in all that trains."""

    moved: tuple[Replayed, ...]
    """The common group under the current policy after each move."""


def slopes(energy_G: Tensor, old_G: Tensor, advantage_G: Tensor, config: RunConfig) -> Tensor:
    """c_g = dL/dE_g of one group, [G]. The old policy is the reference too."""
    old_PG = old_G[None]
    _, slope_PG = energy_weights(
        energy_G[None], old_PG, old_PG, advantage_G[None].to(old_PG), old_PG.new_ones(1),
        config.energy.temperature, config.loss,
    )  # fmt: skip
    return slope_PG[0]


def compare(
    mine: Sequence[GroupTrace], theirs: Sequence[GroupTrace], sigmas: Sequence[float],
    moves: Sequence[Move], config: RunConfig,
) -> dict[str, Any]:  # fmt: skip
    """All figures of one mode against the yardstick's groups, in the same order."""
    pairs = list(zip(mine, theirs, strict=True))
    own = [(a.own_NT, b.own_NT) for a, b in pairs]
    common = [(a.common.energy_NT, b.common.energy_NT) for a, b in pairs]
    drifted = [(a.drifted.energy_NT, b.common.energy_NT) for a, b in pairs]
    return {
        "self": {**_by_level(own, sigmas), **_videos(pairs)},
        "common": {
            **_by_level(common, sigmas, [
                {"velocity_error": mean(error_P), "velocity_error_own_prefix": mean(other_P)}
                for error_P, other_P in zip(
                    _velocity_errors([(a.common, b.common) for a, b in pairs]).T,
                    _velocity_errors([(a.drifted, b.common) for a, b in pairs]).T, strict=True,
                )
            ]),
            **_policies(pairs, config),
        },
        "own_prefix": _by_level(drifted, sigmas),
        "gradient": _gradients(pairs),
        "moves": [
            {**move._asdict(), **_ratios(pairs, index, sigmas, config)}
            for index, move in enumerate(moves)
        ],
    }  # fmt: skip


def _by_level(
    pairs: Sequence[tuple[Tensor, Tensor]], sigmas: Sequence[float],
    more: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Energies [N, T] of two modes, by noise level and over all of them."""
    mine_PNT, theirs_PNT = (torch.stack(part).double() for part in zip(*pairs, strict=True))
    levels = [
        {"sigma": sigma, **energy_figures(mine_PNT[..., step], theirs_PNT[..., step]),
         **(more[step] if more else {})}
        for step, sigma in enumerate(sigmas)
    ]  # fmt: skip
    whole = energy_figures(mine_PNT.sum(dim=2), theirs_PNT.sum(dim=2))
    return {"levels": levels, "all_levels": whole}


def energy_figures(mine_PN: Tensor, theirs_PN: Tensor) -> dict[str, Any]:
    """How energies of the same branches agree; the last column is the anchor's.

    `contrast_error` is that of their differences within a group, all that a policy over branches
    sees; `anchor_share` the anchor's energy over the mean branch's.
    """
    mine_PG, theirs_PG = mine_PN[:, :-1], theirs_PN[:, :-1]
    size_P = theirs_PG.mean(dim=1)
    error_PG = mine_PG - theirs_PG
    return {
        "energy": mean(mine_PG.mean(dim=1)),
        "bias": mean(error_PG.mean(dim=1) / size_P),
        "relative_difference": mean(error_PG.abs().mean(dim=1) / size_P),
        "contrast_error": mean(centred(error_PG).norm(dim=1) / centred(theirs_PG).norm(dim=1)),
        "correlation": jackknife(
            lambda rows: correlation(mine_PG[rows], theirs_PG[rows]), len(mine_PG)
        ),
        "rank_correlation": mean(rank_correlations(mine_PG, theirs_PG)),
        "anchor_energy_max": number(mine_PN[:, -1].max()),
        "anchor_share": mean(mine_PN[:, -1] / mine_PG.mean(dim=1)),
    }


def _videos(pairs: Sequence[tuple[GroupTrace, GroupTrace]]) -> dict[str, Any]:
    """How far the mode's own videos are from the yardstick's: before the fork, and in all."""
    prefix, whole = [], []
    for mine, theirs in pairs:
        if mine.group.plan != theirs.group.plan:
            raise ValueError(
                "the modes drew different plans: their settings differ in more than bits"
            )
        fork = mine.group.plan.fork_frame
        a, b = mine.group.latent_NFCHW.double(), theirs.group.latent_NFCHW.double()
        prefix.append((a - b)[:, :fork].norm() / b[:, :fork].norm())
        whole.append((a - b).norm() / b.norm())
    return {"prefix_difference": mean(torch.stack(prefix)),
            "video_difference": mean(torch.stack(whole))}  # fmt: skip


def _velocity_errors(pairs: Sequence[tuple[Replayed, Replayed]]) -> Tensor:
    """||v - v*|| / ||v*|| by group and step, a mean over sequences: [groups, T]."""
    rows = []
    for mine, theirs in pairs:
        error_NT = _sums((mine.velocity_NPTFCHW - theirs.velocity_NPTFCHW).square())
        rows.append((error_NT / _sums(theirs.velocity_NPTFCHW.square())).sqrt().mean(dim=0))
    return torch.stack(rows)


def _sums(x_NPTFCHW: Tensor) -> Tensor:
    """Over all but sequences and steps, in float64."""
    return x_NPTFCHW.sum(dim=(1, 3, 4, 5, 6), dtype=torch.float64)


def _policies(
    pairs: Sequence[tuple[GroupTrace, GroupTrace]], config: RunConfig
) -> dict[str, Any]:  # fmt: skip
    """Policies over branches and slopes of the loss, on policy."""
    mine_PG, theirs_PG = (_probabilities(part, config) for part in zip(*pairs, strict=True))
    slope = [
        [slopes(t.common.branch_G, t.common.branch_G, t.advantage_G, config) for t in pair]
        for pair in pairs
    ]
    return {
        "policy_difference_max": number((mine_PG - theirs_PG).abs().max()),
        "policy_spread_max": number((theirs_PG - 1 / theirs_PG.shape[1]).abs().max()),
        "loss_slope_error": mean(torch.stack([_error(mine, theirs) for mine, theirs in slope])),
    }


def _probabilities(traces: Sequence[GroupTrace], config: RunConfig) -> Tensor:
    energy_PG = torch.stack([one.common.branch_G for one in traces]).double()
    return branch_log_probs(energy_PG, config.energy.temperature).exp()


def _gradients(pairs: Sequence[tuple[GroupTrace, GroupTrace]]) -> dict[str, Any]:
    """By group, and of the update: the mean over all groups."""
    cosines, sizes = [], []
    for mine, theirs in pairs:
        cosines.append(_cosine(mine.gradient, theirs.gradient))
        sizes.append(mine.gradient.norm().double() / theirs.gradient.norm())
    sums = [torch.stack([trace.gradient for trace in part]).sum(dim=0)
            for part in zip(*pairs, strict=True)]  # fmt: skip
    return {
        "cosine": mean(torch.stack(cosines)), "size": mean(torch.stack(sizes)),
        "cosine_of_sum": number(_cosine(*sums)), "error_of_sum": number(_error(*sums)),
    }  # fmt: skip


def _ratios(
    pairs: Sequence[tuple[GroupTrace, GroupTrace]], move: int, sigmas: Sequence[float],
    config: RunConfig,
) -> dict[str, Any]:  # fmt: skip
    """Log ratios after a move, and what it did to the velocities.

    A `slope` is that of least squares through 0 against the yardstick: 1 where a change is kept on
    average. `difference` is the root mean square of one log ratio less the other.
    """
    mine_PG, theirs_PG = (
        torch.stack([_log_ratio(trace, move, config) for trace in part])
        for part in zip(*pairs, strict=True)
    )
    products = torch.stack([_change_products(mine, theirs, move) for mine, theirs in pairs])
    weights = [
        [slopes(t.moved[move].branch_G, t.common.branch_G, t.advantage_G, config) for t in pair]
        for pair in pairs
    ]
    count = len(pairs)
    return {
        "log_ratio_size": number(_size(theirs_PG)),
        "correlation": jackknife(lambda r: correlation(mine_PG[r], theirs_PG[r]), count),
        "slope": jackknife(lambda r: _slope(mine_PG[r], theirs_PG[r]), count),
        "difference": jackknife(lambda r: _size(mine_PG[r] - theirs_PG[r]), count),
        "loss_slope_error": mean(torch.stack([_error(mine, theirs) for mine, theirs in weights])),
        "velocity": _change_figures(products.sum(dim=1)),
        "levels": [
            {"sigma": sigma, **_change_figures(products[:, step])}
            for step, sigma in enumerate(sigmas)
        ],
    }


def _log_ratio(trace: GroupTrace, move: int, config: RunConfig) -> Tensor:
    """Log pi_current / pi_old of the branches, [G]."""
    both = torch.stack([trace.moved[move].branch_G, trace.common.branch_G]).double()
    log_prob = branch_log_probs(both, config.energy.temperature)
    return log_prob[0] - log_prob[1]


def _change_products(mine: GroupTrace, theirs: GroupTrace, move: int) -> Tensor:
    """m.m, m.t and t.t of the changes of all velocities of a group, by step: [T, 3]."""
    a, b = (
        trace.moved[move].velocity_NPTFCHW - trace.common.velocity_NPTFCHW
        for trace in (mine, theirs)
    )
    return torch.stack([_sums(x).sum(dim=0) for x in (a * a, a * b, b * b)], dim=1)


def _change_figures(products_P3: Tensor) -> dict[str, Figure]:
    """Of groups' m.m, m.t and t.t. `size`: of the changes, over the yardstick's."""

    def figure(statistic: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Figure:
        return jackknife(lambda r: statistic(*products_P3[r].sum(dim=0)), len(products_P3))

    return {
        "cosine": figure(lambda mm, mt, tt: mt / (mm * tt).sqrt()),
        "slope": figure(lambda mm, mt, tt: mt / tt),
        "size": figure(lambda mm, mt, tt: (mm / tt).sqrt()),
    }


def centred(x_PG: Tensor) -> Tensor:
    """Without each group's mean."""
    return x_PG - x_PG.mean(dim=1, keepdim=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over all entries; nan where one does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return _cosine(a.flatten(), b.flatten())


def rank_correlations(a_PG: Tensor, b_PG: Tensor) -> Tensor:
    """Spearman's within each group, [P]. Of equal values the first is the lesser."""
    ranks = [centred(x.argsort(dim=1, stable=True).argsort(dim=1).double()) for x in (a_PG, b_PG)]
    return (ranks[0] * ranks[1]).sum(dim=1) / ranks[0].square().sum(dim=1)


def _slope(mine: Tensor, theirs: Tensor) -> Tensor:
    return (mine * theirs).sum() / theirs.square().sum()


def _size(x: Tensor) -> Tensor:
    """Root mean square."""
    return x.square().mean().sqrt()


def _error(mine: Tensor, theirs: Tensor) -> Tensor:
    error: Tensor = (mine.double() - theirs.double()).norm() / theirs.double().norm()
    return error


def _cosine(mine: Tensor, theirs: Tensor) -> Tensor:
    mine, theirs = mine.double(), theirs.double()
    product: Tensor = torch.dot(mine, theirs) / (mine.norm() * theirs.norm())
    return product


def mean(value_P: Tensor) -> Figure:
    """Over groups, with its standard error."""
    error = value_P.std() / len(value_P) ** 0.5 if len(value_P) > 1 else None
    return {"value": number(value_P.mean()), "standard_error": number(error)}


def jackknife(statistic: Callable[[Tensor], Tensor], groups: int) -> Figure:
    """A statistic of all groups; its standard error from leaving out one after the other.

    `statistic` takes the numbers of the groups that count.
    """
    everyone = torch.arange(groups)
    error = None
    if groups > 1:
        parts = torch.stack([statistic(everyone[everyone != left]) for left in range(groups)])
        error = ((groups - 1) * parts.var(correction=0)).sqrt()
    return {"value": number(statistic(everyone)), "standard_error": number(error)}


def number(value: Tensor | None) -> float | None:
    """As JSON takes it: None for what is not finite."""
    found = math.nan if value is None else float(value)
    return found if math.isfinite(found) else None
