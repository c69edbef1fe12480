"""Every line of the table of rewards keeps the protocol: a new reward is tested by being there."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.config import RewardConfig
from megatron_kvpo.records import Clip, Span
from megatron_kvpo.reward.base import REWARDS, Reward, build_rewards
from megatron_kvpo.world import render, sample_scene


def clips() -> list[Clip]:
    """Scenes of the shapes world of several lengths, one with a switch."""
    found = []
    for seed, (length, switches) in enumerate([(21, ()), (33, (17,)), (21, ())]):
        scene = sample_scene(seed, length, switches)
        frames = torch.from_numpy(render(scene)).permute(0, 3, 1, 2).float() / 255
        edges = [0, *switches, length]
        spans = tuple(
            Span(start=edges[n], stop=edges[n + 1], text=text, history=tuple(scene.captions[:n]))
            for n, text in enumerate(scene.captions)
        )
        found.append(Clip(frames_FCHW=frames, spans=spans))
    return found


@pytest.fixture(scope="module")
def scenes() -> list[Clip]:
    return clips()


def built(name: str) -> Reward:
    """The reward of a component; skips one that asks for files and says by which setting."""
    try:
        (reward,) = build_rewards([name], RewardConfig())
    except ValueError as error:
        if "reward." not in str(error):
            raise
        pytest.skip(f"needs files: {error}")
    return reward


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_reward_has_the_components_that_the_table_says(name: str) -> None:
    reward = built(name)
    assert name in reward.components
    assert len(set(reward.components)) == len(reward.components)
    for other in reward.components:
        assert REWARDS[other] == REWARDS[name], f"{other} is another reward's"


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_score_is_a_finite_number_a_component_and_clip_without_a_graph(
    name: str, scenes: list[Clip]
) -> None:
    reward = built(name)
    with torch.enable_grad():
        for clip in scenes:
            clip.frames_FCHW.requires_grad_(True)
        score_KB = reward.score(scenes)
    assert score_KB.shape == (len(reward.components), len(scenes))
    assert score_KB.dtype == torch.float32
    assert score_KB.isfinite().all()
    assert not score_KB.requires_grad
    assert len(score_KB.unique()) > 1, "all clips score alike"


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_a_score_does_not_depend_on_what_shares_the_batch(name: str, scenes: list[Clip]) -> None:
    reward = built(name)
    together = reward.score(scenes)
    for number, clip in enumerate(scenes):
        assert torch.equal(reward.score([clip])[:, 0], together[:, number])
    assert torch.equal(reward.score(scenes[::-1]), together.flip(1))
