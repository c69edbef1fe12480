"""When the gradients of a real model's update leave."""

from __future__ import annotations

import torch

from megatron_kvpo.rollout import replay as replay_module
from tests.unit import small

ranks = small.ranks


def test_most_gradients_are_on_their_way_before_the_texts_get_theirs(ranks, monkeypatch):
    """And none before the last pass, however many groups and batches there are."""
    tiny = small.build(ranks, "policy.max_rows=1", "optimizer.bucket_mib=0.001")
    groups = tiny.stages.explore(0)
    num_branches = tiny.config.routing.num_branches
    weight_PG = torch.linspace(-1, 1, num_branches).expand(len(groups), -1)
    buckets = tiny.policy.optimizer._wrapped.bucket_groups
    events = []
    for index, bucket in enumerate(buckets):
        monkeypatch.setattr(bucket, "start_grad_sync", lambda index=index: events.append(index))
    push = replay_module._Texts.push
    monkeypatch.setattr(
        replay_module._Texts, "push", lambda texts: (events.append("texts"), push(texts))
    )
    tiny.policy.optimizer.zero_grad()
    tiny.stages.backward(0, groups, weight_PG)
    batches = len(groups) * num_branches
    assert len(groups) > 1
    assert events[: batches - 1] == ["texts"] * (batches - 1)
    last = events[batches - 1 :]
    assert [event for event in last if event != "texts"] == list(range(len(buckets)))
    assert last.index("texts") > 0.6 * len(buckets)
    for sampled in groups:
        sampled.release()
