"""From a group's rewards to one advantage per branch."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from megatron_kvpo.method_config import AdvantageConfig
from megatron_kvpo.records import RewardTable

EPSILON = 1e-8
"""Added to the deviations of fusion `std`, which knows no floor."""


def advantages(
    table: RewardTable, config: AdvantageConfig, coordinates: tuple[int, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Advantage of each branch over the anchor, of the local and the global signal together.

    Per signal and reward component, with the population deviation (divisor G) over the branches,
    the anchor left out:

        a_g = (r_g - r_anchor) / max(std_g r_g, floor)
        signal_g = sum_k w_k a_kg / sum_k w_k
        A_g = clamp(local_weight local_g + global_weight global_g, -limit, limit)

    `baseline: group` then subtracts the mean of A over the branches (so |A| may reach 2 limit);
    `anchor` leaves A as it is. `fusion: std` (the reference) divides by the sample deviation
    (divisor G) of all G + 1 sequences, anchor included, plus 1e-8 in place of the floor, and then
    each signal once more by its own population deviation over the branches: differences of any
    size become advantages of size 1. `negative_weight` then scales what is below 0; `control` acts
    last.

    Args:
        table: Scores of the G branches and the anchor.
        config: Weights, floor, limit, baseline, fusion and control.
        coordinates: Names the draw of `control: shuffled`: (run seed, update, prompt index).

    Returns:
        advantage_G in float32, exactly 0 where all sequences score alike, and metrics to log.

    Raises:
        ValueError: a reward is not finite, or the table's shapes or weights make no sense.
    """
    _check(table)
    local_G, local_floored = _signal(table, table.local_KN, config)
    global_G, global_floored = _signal(table, table.global_KN, config)
    raw_G = config.local_weight * local_G + config.global_weight * global_G
    advantage_G = raw_G.clamp(-config.limit, config.limit)
    metrics = {
        "policy/advantage_clamped_fraction": (advantage_G != raw_G).double().mean(),
        "policy/advantage_floored_fraction": torch.stack([local_floored, global_floored]).mean(),
        "policy/advantage_over_anchor": advantage_G.mean(),
    }
    if config.baseline == "group":
        # The first branch goes first: equal advantages then leave exact zeros, not rounding.
        shifted_G = advantage_G - advantage_G[0]
        advantage_G = shifted_G - shifted_G.mean()
    if config.negative_weight != 1.0:
        weight_G = torch.where(advantage_G < 0, config.negative_weight, 1.0)
        advantage_G = advantage_G * weight_G
    advantage_G = _controlled(advantage_G, config, coordinates)
    metrics |= {
        "policy/advantage_std": advantage_G.std(correction=0),
        "policy/advantage_max": advantage_G.max(),
        "policy/advantage_min": advantage_G.min(),
    }
    metrics |= _reward_metrics(table)
    return advantage_G.float(), {name: value.float() for name, value in metrics.items()}


def beats_anchor(table: RewardTable) -> bool:
    """Whether any branch's weighted reward exceeds the anchor's, locally or globally.

    Raises:
        ValueError: as `advantages`.
    """
    _check(table)
    return any(
        bool((combined_N[:-1] > combined_N[-1]).any())
        for combined_N in (_combined(table, table.local_KN), _combined(table, table.global_KN))
    )


def _signal(
    table: RewardTable, reward_KN: Tensor, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """One signal's advantages [G], and the share of components whose deviation met the floor."""
    reward_KN = reward_KN.detach().double()
    branch_KG, anchor_K1 = reward_KN[:, :-1], reward_KN[:, -1:]
    std_K1 = branch_KG.std(dim=1, correction=0, keepdim=True)
    floored = (std_K1 < config.std_floor).double().mean()
    if config.fusion == "std":
        divisor_K1 = reward_KN.std(dim=1, correction=1, keepdim=True) + EPSILON
    else:
        divisor_K1 = std_K1.clamp(min=config.std_floor)
    weight_K = torch.tensor(table.weights, dtype=torch.float64, device=reward_KN.device)
    component_KG = (branch_KG - anchor_K1) / divisor_K1
    signal_G = (component_KG * (weight_K / weight_K.sum())[:, None]).sum(dim=0)
    if config.fusion == "std":
        std = signal_G.std(correction=0)
        signal_G = torch.where(std > EPSILON, signal_G / (std + EPSILON), signal_G)
    return signal_G, floored


def _controlled(
    advantage_G: Tensor, config: AdvantageConfig, coordinates: tuple[int, ...]
) -> Tensor:
    if config.control == "negated":
        return -advantage_G
    if config.control == "none":
        return advantage_G
    rng = random.Random(f"shuffled advantages {tuple(coordinates)}")
    identity = list(range(len(advantage_G)))
    order = identity
    while order == identity:
        order = rng.sample(identity, len(identity))
    return advantage_G[torch.tensor(order, device=advantage_G.device)]


def _combined(table: RewardTable, reward_KN: Tensor) -> Tensor:
    """Weighted sum of the raw scores, [N]."""
    weight_K1 = torch.tensor(table.weights, dtype=torch.float64, device=reward_KN.device)[:, None]
    return (reward_KN.detach().double() * weight_K1).sum(dim=0)


def _reward_metrics(table: RewardTable) -> dict[str, Tensor]:
    """Per signal: the branches' mean of each component, and their lead over the anchor."""
    metrics = {}
    for signal, reward_KN in (("local", table.local_KN), ("global", table.global_KN)):
        for name, reward_N in zip(table.components, reward_KN.detach().double(), strict=True):
            metrics[f"reward/{signal}_{name}"] = reward_N[:-1].mean()
        combined_N = _combined(table, reward_KN)
        metrics[f"reward/{signal}_over_anchor"] = combined_N[:-1].mean() - combined_N[-1]
        metrics[f"reward/{signal}_best_over_anchor"] = combined_N[:-1].max() - combined_N[-1]
    return metrics


def _check(table: RewardTable) -> None:
    """Refuse a table that could not be turned into advantages, saying where it is wrong."""
    count = len(table.components)
    if len(table.weights) != count or not sum(table.weights) > 0:
        raise ValueError(
            f"reward weights {table.weights} of {count} components {table.components}: give each "
            "a weight, with a sum above 0 (reward.weights)"
        )
    for signal, reward_KN in (("local", table.local_KN), ("global", table.global_KN)):
        if reward_KN.dim() != 2 or reward_KN.shape[0] != count or reward_KN.shape[1] < 3:
            raise ValueError(
                f"{signal} rewards have shape {tuple(reward_KN.shape)}: they need {count} "
                "components by at least 2 branches and the anchor"
            )
        bad = (~reward_KN.isfinite()).nonzero().tolist()
        if bad:
            component, sequence = bad[0]
            last = reward_KN.shape[1] - 1
            who = "the anchor" if sequence == last else f"branch {sequence}"
            raise ValueError(
                f"{signal} reward {table.components[component]} of {who} is "
                f"{reward_KN[component, sequence].item()} ({len(bad)} such scores in the group): "
                "look at its video, and make the reward finite for any frames"
            )
