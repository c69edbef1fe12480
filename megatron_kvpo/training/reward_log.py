"""Every score of an update, group by group: what rewards.jsonl holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo.parallel.collect import gather_rows
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.records import RewardTable
from megatron_kvpo.rollout.group import SampledGroup


def reward_lines(
    groups: Sequence[SampledGroup], tables: Sequence[RewardTable], advantage_PG: Tensor,
    ranks: Ranks,
) -> list[dict[str, Any]]:  # fmt: skip
    """A line for each group of all data ranks. Collective.

    `local` and `global`: component -> scores of the branches, the anchor's last; `advantage`: of
    the branches; `prompt` is its number in the file, `fork` the latent frame.
    """
    names, own = tables[0].components, []
    for sampled, table, advantage_G in zip(groups, tables, advantage_PG, strict=True):
        plan = sampled.group.plan
        head = [float(sampled.group.prompt.index), float(plan.fork_frame)]
        scores = torch.cat([table.local_KN.flatten(), table.global_KN.flatten(), advantage_G])
        own.append(torch.cat([scores.new_tensor(head), scores]).double())
    width = tables[0].local_KN.shape[1]
    rows_PX = gather_rows(
        torch.stack(own).to(ranks.device), ranks.data, [len(own)] * ranks.data.size
    ).cpu()
    lines = []
    for row_X in rows_PX:
        local, whole = row_X[2:].float()[: 2 * len(names) * width].view(2, len(names), width)
        lines.append({
            "prompt": int(row_X[0]), "fork": int(row_X[1]),
            "local": dict(zip(names, local.tolist(), strict=True)),
            "global": dict(zip(names, whole.tolist(), strict=True)),
            "advantage": row_X[2 + 2 * len(names) * width :].float().tolist(),
        })  # fmt: skip
    return lines
