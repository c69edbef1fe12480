"""A dumped group, replayed on one rank, is what two ranks saw; changed weights or latents show."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kvpo.config import load_config
from megatron_kvpo.reward.base import REWARDS, measured
from megatron_kvpo.training.stages import Stages
from tests.parallel.forked_runs import Job, run_jobs
from tests.parallel.tiny_run import (
    Pattern,
    ranks_left,
    train_traced,
    write_recipe,
    write_strong_weights,
)
from tools import replay_group


@pytest.fixture(autouse=True)
def pattern():
    with mock.patch.dict(REWARDS, pattern=measured(Pattern)), ranks_left():
        yield


def replay(folder: Path, capsys, *arguments: str) -> tuple[int, list[dict]]:
    capsys.readouterr()
    code = replay_group.main([str(folder), *arguments])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.gloo
def test_one_rank_finds_what_two_ranks_saw_and_sees_what_was_changed(tmp_path, capsys):
    recipe = write_recipe(tmp_path, **write_strong_weights(tmp_path))
    overrides = ["alarms.dump_updates=[1]", "parallel.tensor=2", "parallel.sequence_parallel=true",
                 "num_updates=2"]  # fmt: skip
    (outcome,) = run_jobs(recipe, [Job("run", overrides)], 120)
    assert outcome.codes == [0, 0], outcome.errors
    folder = tmp_path / "run/dumps/update_00000001"
    code, found = replay(folder, capsys)
    assert code == 0, found
    assert len(found) == 2
    for group in found:
        names = {"energy_current_N", "energy_old_N", "energy_reference_N", "advantage_G",
                 "weight_G", "loss/surrogate", "loss/kl", "loss/total", "latent_NFCHW"}  # fmt: skip
        assert names <= group["difference"].keys()
        energies = group["energy_current_N"]["run"]
        assert len(energies) == 5
        assert energies[0] > 0
        assert group["energy_current_N"]["run"] != group["energy_old_N"]["run"]
        assert group["loss/total"]["replay"] == pytest.approx(group["loss/total"]["run"], rel=1e-3)

    path = sorted(folder.glob("*.safetensors"))[0]
    held = load_file(path)
    held["velocity_NPTFCHW"][2] *= 1.01
    save_file(held, path)
    prompt = str(int(path.stem.removeprefix("prompt_")))
    code, (changed,) = replay(folder, capsys, "--prompt", prompt)
    assert code == 1
    run, again = changed["energy_old_N"].values()
    apart = [abs(a - b) > 1e-3 * max(run) for a, b in zip(run, again, strict=True)]
    assert apart == [False, False, True, False, False]


def test_figures_that_are_not_finite_are_dumped_and_named_before_the_run_ends(tmp_path, capsys):
    recipe = write_recipe(tmp_path, **write_strong_weights(tmp_path))
    real = Stages.advantages

    def spoilt(stages, update, groups, tables):
        advantage_PG, *rest = real(stages, update, groups, tables)
        if update == 1:
            advantage_PG[1, 2] = torch.inf
        return advantage_PG, *rest

    with (
        mock.patch.object(Stages, "advantages", spoilt),
        pytest.raises(ValueError, match=r"advantages are not finite .* \[1, 2\]"),
    ):
        train_traced(load_config(recipe, ["name=spoilt", "num_updates=2"]))
    folder = tmp_path / "spoilt/dumps/update_00000001"
    code, found = replay(folder, capsys)
    assert code == 1
    losses = [group.get("loss") for group in found]
    (bad,) = [loss for loss in losses if loss]
    assert "not finite" in bad["run"]
    assert bad["replay"] == "finite"
    with pytest.raises(ValueError, match="holds 0 groups"):
        replay_group.main([str(tmp_path)])
