"""Every line of the table of rewards keeps the protocol: a new reward is tested by being there."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from megatron_kvpo import settings
from megatron_kvpo.config import RewardConfig
from megatron_kvpo.records import Clip, Span
from megatron_kvpo.reward.base import REWARDS, SHAPES, Reward, build_rewards
from megatron_kvpo.world import render, sample_scene
from tools import random_rewards

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


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


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RewardConfig:
    """Settings that name files of random weights for every reward that wants some."""
    folder = tmp_path_factory.mktemp("rewards")
    values: dict[str, Any] = {}
    for model in get_args(random_rewards.Model):
        for override in random_rewards.write(model, folder / model, tiny=True):
            settings.merge_override(values, override)
    return settings.from_mapping(RewardConfig, values["reward"])


@pytest.fixture(scope="module", params=sorted(REWARDS))
def reward(request, config) -> tuple[str, Reward]:
    (found,) = build_rewards([request.param], config)
    return request.param, found


def test_a_reward_has_the_components_that_the_table_says(reward: tuple[str, Reward]) -> None:
    name, made = reward
    assert name in made.components
    assert len(set(made.components)) == len(made.components)
    for other in made.components:
        assert REWARDS[other] == REWARDS[name], f"{other} is another reward's"


def test_a_score_is_a_finite_number_a_component_and_clip_without_a_graph(
    reward: tuple[str, Reward], scenes: list[Clip]
) -> None:
    _, made = reward
    with torch.enable_grad():
        for clip in scenes:
            clip.frames_FCHW.requires_grad_(True)
        score_KB = made.score(scenes)
    assert score_KB.shape == (len(made.components), len(scenes))
    assert score_KB.dtype == torch.float32
    assert score_KB.isfinite().all()
    assert not score_KB.requires_grad
    assert len(score_KB.unique()) > 1, "all clips score alike"


def test_a_score_does_not_depend_on_what_shares_the_batch(
    reward: tuple[str, Reward], scenes: list[Clip]
) -> None:
    """To rounding: a batch of another size has other kernels."""
    _, made = reward
    together = made.score(scenes)
    for number, clip in enumerate(scenes):
        torch.testing.assert_close(made.score([clip])[:, 0], together[:, number], **CLOSE)
    torch.testing.assert_close(made.score(scenes[::-1]), together.flip(1), **CLOSE)


def test_settings_without_files_are_refused_by_the_settings_name() -> None:
    for name in set(REWARDS) - set(SHAPES):
        with pytest.raises(ValueError, match=r"^reward\.\w+\.\w+ is not set: give "):
            build_rewards([name], RewardConfig())
