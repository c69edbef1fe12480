"""The KVPO objective on groups' log-probabilities. Pure: no model, no ranks, no config file."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_kvpo.algorithm.energy import branch_log_probs
from megatron_kvpo.method_config import LossConfig
from megatron_kvpo.records import LossOutput


def kvpo_loss(
    log_prob_PG: Tensor,
    old_log_prob_PG: Tensor,
    reference_log_prob_PG: Tensor | None,
    advantage_PG: Tensor,
    scale_P: Tensor,
    config: LossConfig,
) -> LossOutput:
    """Clipped surrogate plus KL to the reference, over the branches of each prompt.

        L = mean_p scale_p [ -mean_g min(rho A, clip(rho, 1 - low, 1 + high) A)
                             + kl_coefficient sum_g pi (log pi - log pi_reference) ],
        rho = pi / pi_old

    Args:
        log_prob_PG: Current policy, normalised over each group. The only input with gradient.
        old_log_prob_PG: The policy that sampled the groups.
        reference_log_prob_PG: Frozen initial policy; None drops the KL.
        advantage_PG: Of each branch.
        scale_P: 1, or `config.unsafe_scale` where no branch beats the anchor.
        config: Trust region and KL weight.

    Returns:
        The loss to minimise, a mean over the P groups given, and its parts.

    Raises:
        ValueError: an input or a term of the loss is not finite, by name.
    """
    _check_inputs(log_prob_PG, old_log_prob_PG, reference_log_prob_PG, advantage_PG)
    ratio_PG = (log_prob_PG - old_log_prob_PG.detach()).exp()
    clipped_PG = ratio_PG.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain_P = torch.minimum(ratio_PG * advantage_PG, clipped_PG * advantage_PG).mean(dim=-1)
    if scale_P.shape != gain_P.shape:
        raise ValueError(
            f"scale_P has shape {tuple(scale_P.shape)}: give one factor per group, "
            f"{tuple(gain_P.shape)}"
        )
    surrogate = -(gain_P * scale_P).mean()
    kl = log_prob_PG.new_zeros(())
    if reference_log_prob_PG is not None:
        kl_PG = log_prob_PG.exp() * (log_prob_PG - reference_log_prob_PG.detach())
        kl = (kl_PG.sum(dim=-1) * scale_P).mean()

    metrics = {
        "loss/surrogate": surrogate.detach(),
        "loss/kl": kl.detach(),
        "policy/ratio_max": ratio_PG.detach().max(),
        "policy/ratio_min": ratio_PG.detach().min(),
        "policy/clip_fraction": (ratio_PG != clipped_PG).float().mean(),
        "policy/entropy": -(log_prob_PG.exp() * log_prob_PG).sum(dim=-1).mean().detach(),
    }
    for name in ("loss/surrogate", "loss/kl"):
        if not metrics[name].isfinite():
            raise ValueError(
                f"{name} is {metrics[name].item()}: ratios lie in "
                f"[{metrics['policy/ratio_min'].item():.3g}, "
                f"{metrics['policy/ratio_max'].item():.3g}]. The policy has left the one that "
                "sampled: lower optimizer.lr or raise energy.temperature"
            )
    return LossOutput(loss=surrogate + config.kl_coefficient * kl, metrics=metrics)


def energy_weights(
    energy_PG: Tensor,
    old_energy_PG: Tensor,
    reference_energy_PG: Tensor | None,
    advantage_PG: Tensor,
    scale_P: Tensor,
    temperature: float,
    config: LossConfig,
) -> tuple[LossOutput, Tensor]:
    """The loss of groups whose energies are known as numbers, and its slope in each energy.

        dL/dtheta = sum_g c_g dE_g/dtheta,    c_g = dL/dE_g

    so each branch can be replayed with gradient by itself, anywhere, and sent backward with its
    c_g: `(weight_PG.detach() * energy_PG).sum().backward()` gives the gradient of the loss.

    Args:
        energy_PG: Current policy's energies; a graph behind them is not followed.
        old_energy_PG: Those of the policy that sampled.
        reference_energy_PG: Those of the initial policy; None drops the KL.
        advantage_PG: Of each branch.
        scale_P: As in `kvpo_loss`.
        temperature: Of the softmax over branches.
        config: Trust region and KL weight.

    Returns:
        The loss, detached, with its metrics, and weight_PG = c_g, which sums to 0 over a group
        up to rounding. The mean over groups is in it.

    Raises:
        ValueError: as `kvpo_loss`, or the temperature is not positive.
    """
    leaf_PG = energy_PG.detach().clone().requires_grad_()
    with torch.no_grad():
        old_PG = branch_log_probs(old_energy_PG, temperature)
        reference_PG = (
            None
            if reference_energy_PG is None
            else branch_log_probs(reference_energy_PG, temperature)
        )
    with torch.enable_grad():
        log_prob_PG = branch_log_probs(leaf_PG, temperature)
        output = kvpo_loss(log_prob_PG, old_PG, reference_PG, advantage_PG, scale_P, config)
        (weight_PG,) = torch.autograd.grad(output.loss, leaf_PG)
    return LossOutput(loss=output.loss.detach(), metrics=output.metrics), weight_PG


def _check_inputs(
    log_prob_PG: Tensor,
    old_log_prob_PG: Tensor,
    reference_log_prob_PG: Tensor | None,
    advantage_PG: Tensor,
) -> None:
    inputs = {
        "log-probabilities of the current policy": log_prob_PG,
        "log-probabilities of the old policy": old_log_prob_PG,
        "log-probabilities of the reference policy": reference_log_prob_PG,
        "advantages": advantage_PG,
    }
    for name, value_PG in inputs.items():
        if value_PG is None:
            continue
        if value_PG.shape != log_prob_PG.shape:
            raise ValueError(
                f"{name} have shape {tuple(value_PG.shape)}, the policy "
                f"{tuple(log_prob_PG.shape)}: both are [P groups, G branches]"
            )
        bad = (~value_PG.isfinite()).nonzero().tolist()
        if bad:
            raise ValueError(
                f"{name} are not finite in {len(bad)} of {value_PG.numel()} places, first at "
                f"[group, branch] {bad[0]}: the loss would be too. Look for non-finite energies "
                "(weights, latents) or rewards"
            )
