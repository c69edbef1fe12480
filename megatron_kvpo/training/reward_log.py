"""Every score and energy of an update, group by group: what rewards.jsonl holds, and its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.parallel.collect import gather_rows
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import Energies, Prompt, RewardTable
from megatron_kvpo.rollout.group import SampledGroup


def reward_lines(
    groups: Sequence[SampledGroup], tables: Sequence[RewardTable], advantage_PG: Tensor,
    ranks: Ranks, energies: Energies | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A line for each group of all data ranks. Collective.

    `local` and `global`: component -> scores of the branches, the anchor's last; `energy`: of the
    current policy's replays, before the update, the same way; `advantage`: of the branches;
    `prompt` is its number in the file, `fork` the latent frame.
    """
    names, own = tables[0].components, []
    for place, (sampled, table) in enumerate(zip(groups, tables, strict=True)):
        plan = sampled.group.plan
        head = [float(sampled.group.prompt.index), float(plan.fork_frame)]
        parts = [table.local_KN.flatten(), table.global_KN.flatten(), advantage_PG[place]]
        if energies is not None:
            parts.append(energies.energy_N(place))
        row = torch.cat([part.double().cpu() for part in parts])
        own.append(torch.cat([row.new_tensor(head), row]))
    width = tables[0].local_KN.shape[1]
    rows_PX = gather_rows(
        torch.stack(own).to(ranks.device), ranks.data, [len(own)] * ranks.data.size
    ).cpu()
    lines = []
    for row_X in rows_PX:
        scores_X, rest_X = row_X[2:].float().tensor_split([2 * len(names) * width])
        local, whole = scores_X.view(2, len(names), width)
        line = {
            "prompt": int(row_X[0]), "fork": int(row_X[1]),
            "local": dict(zip(names, local.tolist(), strict=True)),
            "global": dict(zip(names, whole.tolist(), strict=True)),
            "advantage": rest_X[: width - 1].tolist(),
        }  # fmt: skip
        if energies is not None:
            line["energy"] = rest_X[width - 1 :].tolist()
        lines.append(line)
    return lines


def table_rows(
    lines: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], weights: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each branch and anchor of some lines, with its caption and composite score.

    `weights`: of the reward's components. The anchor has no advantage.
    """
    texts = {prompt.index: "; then ".join(prompt.segments) for prompt in prompts}
    total, rows = sum(weights.values()), []
    for line in lines:
        last = len(line["advantage"])
        for n in range(last + 1):
            scores = {name: score[n] for name, score in line["global"].items()}
            rows.append({
                "prompt": line["prompt"], "caption": texts[line["prompt"]], "fork": line["fork"],
                "sequence": "anchor" if n == last else f"branch {n}",
                "composite": sum(weights[name] * scores[name] for name in weights) / total,
                "advantage": None if n == last else line["advantage"][n],
                "energy": line["energy"][n] if "energy" in line else None,
                **{f"global/{name}": score for name, score in scores.items()},
                **{f"local/{name}": score[n] for name, score in line["local"].items()},
            })  # fmt: skip
    return rows
