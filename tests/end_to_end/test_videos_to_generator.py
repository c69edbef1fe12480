"""Videos to latents to a pre-trained generator to a KVPO update, with a cache and without one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor

pytest.importorskip("nvidia.dali")

from megatron_kvpo import settings
from megatron_kvpo.checkpoint.formats import open_checkpoint
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.training.learner import Learner
from megatron_kvpo.training.pretrain import pretrain
from tests.parallel.tiny_run import ranks_left, tiny_config, train_traced
from tests.ranks import on_ranks
from tests.unit.tiny_pretrain import recipe
from tools import cache_latents, generate

FRAMES, COUNT, STEPS = 12, 5, 4
CODEC = 16
SETTINGS = [
    f"codec.width={CODEC}", f"stream.num_frames={FRAMES}", "stream.resident_frames=12",
    f"fitting.steps={STEPS}", "fitting.batch_size=2", "fitting.schedule=constant",
    "fitting.own_estimates_from=1", "checkpoint.every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five videos in `videos`, longer than a clip, and their `latents` in two clips each."""
    made = tmp_path_factory.mktemp("videos_to_generator")
    manifest = write_dataset(made / "videos", COUNT, 4, num_latent_frames=FRAMES + 2)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, line in enumerate(lines):
        colour = ("red", "blue", "green", "cyan", "purple")[number]
        line |= {"segments": [f"a {colour} square moves right", "it falls"], "switch_frames": [6]}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {key: value for key, value in settings_of(made).items()
              if key in cache_latents.SHARED_SECTIONS}  # fmt: skip
    (made / "recipe.yaml").write_text(yaml.safe_dump(shared))
    assert cache_latents.main([
        str(made / "recipe.yaml"), "--videos", str(made / "videos"), "--output",
        str(made / "latents"), "--frames", str(FRAMES), "--starts", "0,5", "--device", "cpu",
    ]) == 0  # fmt: skip
    return made


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = settings.to_mapping(recipe(folder, *SETTINGS))
    return found


def from_cache(folder: Path) -> list[str]:
    return [f"latents.folder={folder / 'latents'}"]


def from_videos(folder: Path, start: str = "fixed") -> list[str]:
    more = ["latents.videos.starts=[0,5]"] if start == "fixed" else []
    return [f"latents.videos.path={folder / 'videos'}", f"latents.videos.start={start}", *more]


def trained(folder: Path, *overrides: str) -> dict[str, Any]:
    """A run of pre-training: what each step saw, its loss, and what was written."""
    found: dict[str, Any] = {"index": [], "latent": [], "loss": []}
    step = Learner.train_step

    def watched(learner: Learner, batch: LatentBatch, *args: Any, **more: Any) -> Tensor:
        found["index"].append(batch.index_B.tolist())
        found["latent"].append(batch.latent_BFCHW.clone())
        loss = step(learner, batch, *args, **more)
        found["loss"].append(float(loss))
        return loss

    with mock.patch.object(Learner, "train_step", watched), ranks_left():
        found["written"] = str(pretrain(recipe(folder, *SETTINGS, *overrides)) or "")
    return found


@pytest.fixture(scope="module")
def cached(folder) -> dict[str, Any]:
    return trained(folder, "name=cached", *from_cache(folder))


def test_the_cache_and_the_videos_train_alike_bit_for_bit(folder, cached):
    direct = trained(folder, "name=direct", *from_videos(folder))
    assert direct["index"] == cached["index"]
    assert direct["loss"] == cached["loss"]
    assert len({tuple(index) for index in cached["index"]}) == STEPS
    a, b = (open_checkpoint(Path(run["written"])) for run in (direct, cached))
    assert a.shapes.keys() == b.shapes.keys()
    assert all(torch.equal(a.read(name, None), b.read(name, None)) for name in a.shapes)


@pytest.mark.parametrize("start", ["fixed", "random"])
def test_a_resumed_run_sees_what_an_undisturbed_one_sees(folder, cached, start):
    whole = cached
    if start == "random":
        whole = trained(folder, "name=drawn", *from_videos(folder, start))
    name = f"name=halves_{start}"
    first = trained(folder, name, *from_videos(folder, start), "fitting.steps=2")
    second = trained(folder, name, *from_videos(folder, start))
    assert [*first["index"], *second["index"]] == whole["index"]
    assert [*first["loss"], *second["loss"]] == whole["loss"]
    other = "random" if start == "fixed" else "fixed"
    with pytest.raises(ValueError, match="was trained on the data set"):
        trained(folder, name, *from_videos(folder, other))


def on_two(rank: int, folder: Path) -> dict[str, Any]:
    tensor = ["parallel.tensor=2", "parallel.sequence_parallel=true", "checkpoint.every=0"]
    data = ["checkpoint.every=0"]
    return {
        "data": trained(folder, "name=data", *from_videos(folder), *data),
        "tensor": trained(folder, "name=tensor", *from_videos(folder), *tensor),
        "drawn": trained(folder, "name=drawn_two", *from_videos(folder, "random"), *data),
    }


def joined(ranks: Iterable[dict[str, Any]], what: str) -> list[Any]:
    """What several data ranks saw, step by step, side by side."""
    return [[x for part in parts for x in part]
            for parts in zip(*(rank[what] for rank in ranks), strict=True)]  # fmt: skip


@pytest.mark.gloo
def test_two_ranks_see_together_what_one_sees(folder, cached, tmp_path):
    drawn = trained(folder, "name=drawn_one", *from_videos(folder, "random"))
    ranks = on_ranks(2, on_two, folder, folder=tmp_path)
    for name, alone in (("data", cached), ("drawn", drawn)):
        assert joined([rank[name] for rank in ranks], "index") == alone["index"]
        for latents, whole in zip(
            joined([rank[name] for rank in ranks], "latent"), alone["latent"], strict=True
        ):
            assert torch.equal(torch.stack(latents), whole)
    for rank in ranks:
        assert rank["tensor"]["index"] == cached["index"]
        for latent, whole in zip(rank["tensor"]["latent"], cached["latent"], strict=True):
            assert torch.equal(latent, whole)
        assert rank["tensor"]["loss"] == pytest.approx(cached["loss"], rel=1e-4)
    mean = [sum(losses) / 2 for losses in zip(*(r["data"]["loss"] for r in ranks), strict=True)]
    assert mean == pytest.approx(cached["loss"], rel=1e-4)


def test_what_was_trained_generates_and_is_aligned(folder, cached, tmp_path):
    output = tmp_path / "out.safetensors"
    assert generate.main([
        str(folder / "recipe.yaml"), "device=cpu", "--weights", cached["written"], "--output",
        str(output), "--prompt", "a red square moves right",
    ]) == 0  # fmt: skip
    assert output.is_file()
    update = ["num_updates=1", f"model.weights={cached['written']}", f"codec.width={CODEC}"]
    trace = train_traced(tiny_config(tmp_path, *update))
    (line,) = [line for line in trace.metrics if "policy/grad_norm" in line]
    assert line["policy/grad_norm"] > 0
    assert line["policy/anchor_energy"] == 0


def test_a_cache_of_other_clips_than_the_model_takes_is_refused_at_the_start(folder):
    with pytest.raises(ValueError, match=r"latents holds clips .*\(12, 4, 8, 8\).* say \(18, 4"):
        trained(folder, "name=long", *from_cache(folder), "stream.num_frames=18",
                "stream.resident_frames=18")  # fmt: skip
    with pytest.raises(ValueError, match="holds texts of 12 x 16, the model takes 13 x 16"):
        trained(folder, "name=long", *from_cache(folder), "model.text_length=13")
