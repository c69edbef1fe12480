"""What is wrong with a recipe, a file or a number is said before it does harm, and by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kvpo import train as program
from megatron_kvpo.config import load_config
from megatron_kvpo.records import Energies
from megatron_kvpo.reward.shapes import TemporalConsistency
from megatron_kvpo.training.metrics import read_jsonl
from megatron_kvpo.training.policy import Policy
from megatron_kvpo.training.replays import Ask
from megatron_kvpo.training.stages import Stages
from tests.parallel.tiny_run import (
    PROMPTS,
    ranks_left,
    tiny_config,
    train_traced,
    whole_weights,
    write_recipe,
    write_strong_weights,
)
from tests.ranks import on_ranks


def _refusal(recipe: Path, *overrides: str) -> str:
    """What train.train says of a recipe; nothing may have been written by then."""
    config = load_config(recipe, list(overrides))
    with ranks_left(), pytest.raises(ValueError) as caught:  # noqa: PT011  the caller matches it
        program.train(config)
    assert not config.run_folder.exists(), "a refused recipe left files"
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_recipe(tmp_path, reward={"weights": {"temporal_consistency": 1.0}})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lrr=1", "unknown setting optimizer.lrr; did you mean optimizer.lr?"),
        ("optimiser.lr=1", "unknown setting optimiser; did you mean optimizer?"),
        ("num_update=2", "unknown setting num_update; did you mean num_updates?"),
        ("optimizer=3", "optimizer is a section: give it keys, not 3"),
        ("seed", "override 'seed' is not of the form section.key=value"),
        ("policy.mode=all", "policy.mode is 'all': choose one of ['lora', 'full']"),
        ("num_updates=two", "num_updates is 'two': it takes a whole number"),
        ("num_updates=0", "run.num_updates is 0: it must be above 0"),
        (
            "reward.service={spawn: true, patience_s: 600}",
            "reward.service.patience_s 600 is not below parallel.timeout_s 600",
        ),
        ("evaluation.filmstrips=0", "evaluation.filmstrips is 0: it must be above 0"),
        ("evaluation.every=-1", "evaluation.every is -1: use 0 or more"),
        ("model.num_heads=3", "model.hidden_dim 64 over model.num_heads 3 must be an even whole"),
        ("stream.num_frames=17", "stream.num_frames is 17: it must be a multiple of"),
        ("stream.num_frames=33", "stream.num_frames 33 exceeds model.max_frames 32"),
        ("energy.grad_steps=3", "energy.grad_steps 3 exceeds the 2 denoising steps"),
        ("parallel.sequence_parallel=true", "set parallel.tensor above 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_as_it_is_read(recipe, override, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  compared below, without escapes
        load_config(recipe, [override])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=3"], "model.num_heads 4 does not divide by parallel.tensor x"),
        (["parallel.context=8"], "model.num_heads 4 does not divide by parallel.tensor x"),
        (["parallel.tensor=4", "model.ffn_dim=90"], "model.ffn_dim 90 does not divide by"),
        (["parallel.tensor=2", "parallel.sequence_parallel=true", "model.latent_height=6",
          "model.latent_width=6"], "a block's 27 tokens do not divide over context x sequence = 2"),
        (["parallel.tensor=2", "parallel.sequence_parallel=true", "model.text_length=11"],
         "model.text_length 11 does not divide by parallel.tensor 2"),
        (["parallel.branch=5"], "parallel.branch 5 exceeds routing.num_branches 4"),
        (["parallel.tensor=2"], "1 ranks cannot be split into parallel.tensor 2"),
        (["policy.groups_per_update=5"], "policy.groups_per_update 5 must lie in [1, 4]"),
        (["routing.num_routed_blocks=3"], "no legal fork: 3 routed blocks take 9 frames"),
        (["routing.pool_margin_frames=4"], "no legal fork: a branch draws 5 frames"),
        (["reward.weights={text_alignmet: 1}"],
         "unknown reward 'text_alignmet': did you mean 'text_alignment'?"),
        (["reward.held_out=[beauty]"], "unknown reward 'beauty'"),
        (["reward.weights={temporal_consistency: 0}"], "name no reward to train on"),
        (["data.prompts=/nowhere/p.jsonl"], "no prompt file at /nowhere/p.jsonl"),
        (["evaluation.prompts=/nowhere/e.jsonl"], "no prompt file at /nowhere/e.jsonl"),
        (["model.weights=/nowhere/w.safetensors"], "no file at /nowhere/w.safetensors: give"),
        (["codec.weights=/nowhere/c.safetensors"], "no codec at /nowhere/c.safetensors"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_refused_at_the_start(recipe, overrides, said):
    assert said in _refusal(recipe, *overrides)


def _groups_do_not_divide(rank: int, recipe: Path) -> str:
    return _refusal(recipe, "policy.groups_per_update=3")


@pytest.mark.gloo
def test_groups_that_do_not_divide_over_the_data_ranks_are_refused(recipe, tmp_path):
    for said in on_ranks(2, _groups_do_not_divide, recipe, folder=tmp_path):
        assert "policy.groups_per_update 3 does not divide over 2 data ranks" in said


@pytest.mark.parametrize("key", ["data.prompts", "evaluation.prompts"])
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds 0 prompts"),
        (["{segments"], "line 1 is not JSON"),
        ([{"texts": ["a red square falls"]}], "line 1 has no key 'segments'"),
        ([PROMPTS[0], {"segments": [" "]}], "line 2: prompt 1 has an empty segment"),
        ([{**PROMPTS[1], "switch_frames": [7]}],
         "prompt 0 switches at latent frame 7, inside a block of 3: use 6 or 9"),
        ([{**PROMPTS[1], "switch_frames": [18]}], "prompt 0 switches at latent frame 18"),
        ([{**PROMPTS[1], "switch_frames": []}], "line 1: prompt 0 has 2 segments and 0 switch"),
        ([PROMPTS[0], {"segments": ["a red squirrel falls"]}],
         "unknown word 'squirrel' in 'a red squirrel falls'; the nearest known word is 'square'"),
        ([{"segments": ["a red square right moves"]}], "cannot read 'right moves' in"),
        ([{"segments": [" and ".join(["a red square falls slowly"] * 3)]}],
         "17 words in 'a red square falls slowly and"),
    ],
)  # fmt: skip
def test_a_bad_prompt_is_refused_at_the_start(recipe, tmp_path, key, lines, said):
    file = tmp_path / "bad.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("".join(f"{text}\n" for text in texts))
    assert said in _refusal(recipe, f"{key}={file}")


def test_files_of_something_else_are_refused(recipe, tmp_path):
    write_strong_weights(tmp_path)
    model, codec = tmp_path / "transformer.safetensors", tmp_path / "codec.safetensors"
    text = tmp_path / "text.safetensors"
    text.write_text("not tensors")
    reward = "reward.weights={temporal_consistency: 1}"
    for override, said in (
        (f"model.weights={codec}", "check that it is the right file and the right size of model"),
        (f"model.weights={text}", "text.safetensors is not a whole safetensors file"),
        (f"codec.weights={model}", "transformer.safetensors is not this codec: "),
        (f"codec.weights={text}", "text.safetensors is not a safetensors file"),
    ):
        assert said in _refusal(recipe, override, reward)
    said = _refusal(recipe, f"model.weights={model}", "model.ffn_dim=64", reward)
    assert "blocks.0.ffn.0.weight is [96, 64], the model needs [64, 64]" in said
    said = _refusal(recipe, f"codec.weights={codec}", "codec.width=32", reward)
    assert "of another size" in said
    assert "check codec.width 32" in said


class _Poison:
    """Lets update 0 pass; at the start of update 1 keeps the weights and becomes active."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active, self.weights = False, dict[str, Tensor]()
        self.policy: Any = None
        explore = Stages.explore

        def watched(stages: Stages, update: int, **how: Any) -> Any:
            if update == 1:
                self.active, self.policy = True, stages.policy
                self.weights = whole_weights(stages.policy)
            return explore(stages, update, **how)

        monkeypatch.setattr(Stages, "explore", watched)

    def of(self, value: Tensor) -> Tensor:
        return value * torch.nan if self.active else value


def _in_a_reward(poison: _Poison, monkeypatch: pytest.MonkeyPatch) -> None:
    score = TemporalConsistency.score
    monkeypatch.setattr(TemporalConsistency, "score", lambda r, clips: poison.of(score(r, clips)))


def _in_an_energy(poison: _Poison, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = Stages.replays

    def spoiled(
        stages: Stages, update: int, groups: Any, asks: Sequence[Ask]
    ) -> list[Energies]:  # fmt: skip
        found = replays(stages, update, groups, asks)
        return [
            part._replace(branch_PG=poison.of(part.branch_PG)) if ask.slot == "current" else part
            for ask, part in zip(asks, found, strict=True)
        ]

    monkeypatch.setattr(Stages, "replays", spoiled)


def _in_a_gradient(poison: _Poison, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Stages.backward

    def spoiled(stages: Stages, *arguments: Any) -> Tensor:
        drift = backward(stages, *arguments)
        first = next(iter(stages.policy.trained().values()))
        first.main_grad[0] = poison.of(first.main_grad[0])
        return drift

    monkeypatch.setattr(Stages, "backward", spoiled)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_in_a_reward, "local reward temporal_consistency of branch 0 is nan"),
        (_in_an_energy, "log-probabilities of the current policy are not finite in 8 of 8 places"),
        (_in_a_gradient, "update 1 has gradient norm nan: no weight was changed"),
    ],
)
def test_a_nan_stops_the_run_before_the_update(
    tmp_path, monkeypatch, spoil: Callable[..., None], said
):
    poison = _Poison(monkeypatch)
    spoil(poison, monkeypatch)
    config = tiny_config(
        tmp_path, reward={"weights": {"temporal_consistency": 1.0}}, checkpoint={"every": 1}
    )
    with ranks_left(), pytest.raises(ValueError, match=said):
        program.train(config)
    after = whole_weights(poison.policy) if poison.policy else {}
    assert after.keys() == poison.weights.keys() != set()
    assert all(torch.equal(after[name], value) for name, value in poison.weights.items())
    assert [line["update"] for line in read_jsonl(config.run_folder / "metrics.jsonl")] == [0]
    saved = sorted(p.name for p in (config.run_folder / "checkpoints").glob("step_*"))
    assert saved == ["step_00000001"]


def test_a_nan_in_the_weights_is_caught_at_the_start(tmp_path, monkeypatch):
    build = Policy.build

    def spoiled(*arguments: Any, **options: Any) -> Policy:
        policy = build(*arguments, **options)
        with torch.no_grad():
            policy.model.head.head.bias[0] = torch.nan
        return policy

    monkeypatch.setattr(Policy, "build", staticmethod(spoiled))
    config = tiny_config(tmp_path)
    with pytest.raises(ValueError, match=r"nan|not finite"):
        train_traced(config)
    assert not read_jsonl(config.run_folder / "metrics.jsonl")


def test_a_corrupt_video_is_skipped_counted_and_named(tmp_path, caplog):
    pytest.importorskip("nvidia.dali")
    from megatron_kvpo.data.shapes import write_dataset
    from megatron_kvpo.data.video import ClipSpec, VideoPipeline, VideoSource, load_videos

    folder = tmp_path / "videos"
    write_dataset(folder, 4, seed=0, num_latent_frames=6)
    torn = (folder / "00001.mp4").read_bytes()
    (folder / "00001.mp4").write_bytes(torn[: len(torn) // 2])
    (folder / "00003.mp4").write_bytes(b"\0" * 1000)
    clip = ClipSpec(num_pixel_frames=21, size=(16, 16))
    with caplog.at_level(logging.WARNING):
        source = VideoSource(path=folder, max_bad=0.5)
        pipeline = VideoPipeline(source, clip, batch_size=2, shuffle=False)
    assert [file.index for file in pipeline.report.good] == [0, 2]
    assert load_videos(pipeline).shape == (2, 3, 21, 16, 16)
    assert "2 of 4 videos cannot be used: 00001.mp4: " in caplog.text
    assert "; 00003.mp4: " in caplog.text
