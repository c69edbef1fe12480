"""examples/shapes/continue.yaml: the demo's generator goes on from clips of the shapes world."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_kvpo.config import load_config
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.rollout.sampler import encode_segment
from megatron_kvpo.rollout.stream import Stream
from megatron_kvpo.training.stages import Stages
from tests.parallel.tiny_run import train_traced

pytest.importorskip("nvidia.dali")

from megatron_kvpo.data.video import ClipSpec, decode_file
from megatron_kvpo.model.codec import load_codec

ROOT = Path(__file__).parents[2]
OVERRIDES = ["num_updates=1", "policy.groups_per_update=2", "evaluation.noises_per_prompt=1",
             "evaluation.filmstrips=1", "checkpoint.every=0", "log.report=false",
             "log.wandb=disabled", "device=cpu"]  # fmt: skip


def refilled(stages: Stages, sampled: SampledGroup) -> Stream:
    """The prefix of a group, made of its finished latents by clean passes alone."""
    group, model = sampled.group, stages.world.model
    latent, prompt = group.latent_NFCHW[:1], group.prompt
    stream = Stream.begin(stages.world, 1, encode_segment(model, stages.encode, [prompt], 0))
    for frame in range(0, group.plan.fork_frame + 1, 3):
        if frame in prompt.switch_frames:
            text = encode_segment(model, stages.encode, [prompt], frame)
            stream.recache(text, latent[:, :frame])
        if frame < group.plan.fork_frame:
            stream.commit(latent[:, frame : frame + 3])
    return stream


def test_the_example_begins_with_its_clips_and_trains_with_the_alarms_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("examples/shapes/continue.yaml", [*OVERRIDES, f"folder={tmp_path}"])
    assert config.alarms.enabled
    codec = load_codec(config.codec, config.model.latent_channels)
    explore, seen = Stages.explore, []

    def watched(stages: Stages, update: int, *, send: bool = False) -> list[SampledGroup]:
        groups = explore(stages, update, send=send)
        for sampled in groups:
            prompt, latent = sampled.group.prompt, sampled.group.latent_NFCHW
            spec = ClipSpec(num_pixel_frames=45, size=(32, 32))
            with torch.no_grad():
                given = codec.encode(decode_file(prompt.video, spec)[None])
            assert torch.equal(latent[:, :12], given.expand(9, -1, -1, -1, -1))
            with torch.no_grad(), stages.policy.acting("old"):
                by_hand = refilled(stages, sampled)
            ours, theirs = sampled.prefix.tables[0].pages, by_hand.tables[0].pages
            assert ours.keys() == theirs.keys() >= set(range(12))
            for held in (stages.world.pool.key, stages.world.pool.value):
                for frame in ours:
                    assert torch.equal(held[:, ours[frame]], held[:, theirs[frame]])
            by_hand.release()
            seen.append(prompt.index)
        return groups

    with mock.patch.object(Stages, "explore", watched):
        trace = train_traced(config)
    assert len(set(seen)) == 2
    (update,) = [line for line in trace.metrics if "policy/grad_norm" in line]
    assert update["policy/grad_norm"] > 0
    assert update["policy/anchor_energy"] == 0
    assert update["policy/latent_distance"] > 0.01
    assert any(not torch.equal(trace.weights[n], trace.start[n]) for n in trace.gradients[0])
