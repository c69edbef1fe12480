"""Prompts that continue videos: one run on any layout and after a resume, or refused in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvidia.dali")

from megatron_kvpo.config import load_config
from megatron_kvpo.data.shapes import write_dataset
from megatron_kvpo.training.parts import check_run
from tests.parallel.test_parity import check_run as check_parity
from tests.parallel.test_parity import check_that_it_learns, run_layouts
from tests.parallel.test_resume import assert_one_run, in_two_parts
from tests.parallel.tiny_run import tiny_config, write_recipe, write_strong_weights
from tests.ranks import on_ranks
from tools import cache_latents

LAYOUTS = {"branch": ["parallel.branch=2"], "data": [], "tensor": ["parallel.tensor=2"]}

PROMPTS: tuple[dict[str, Any], ...] = (
    {"segments": ["a red square moves right"], "video": "clips/00000.mp4", "video_frames": 12},
    {"segments": ["a cyan circle falls", "it turns red"], "switch_frames": [6],
     "video": "clips/00001.mp4", "video_frames": 6},
    {"segments": ["a blue cross rises slowly", "it moves left"], "switch_frames": [12],
     "video": "latents", "clip": 2, "video_frames": 9},
    {"segments": ["a green square stays still", "it turns purple and falls"],
     "switch_frames": [15]},
)  # fmt: skip
"""Up to the fork (12), with a switch inside the run, from a cache, and from nothing."""


def continuing_recipe(folder: Path) -> Path:
    """The tiny recipe with these prompts, their videos and an evaluation of two of them."""
    sections = write_strong_weights(folder)
    videos = folder / "clips"
    manifest = write_dataset(videos, 3, 4, num_latent_frames=12)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:  # few words, as the recipe's texts
        line |= {"segments": ["a red square moves right"], "switch_frames": []}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS[1:3]))
    recipe = write_recipe(
        folder, prompts=PROMPTS, **sections,
        evaluation={"prompts": str(held_out), "noises_per_prompt": 2, "filmstrips": 1},
    )  # fmt: skip
    assert cache_latents.main([
        str(recipe), "--videos", str(videos), "--output", str(folder / "latents"), "--frames", "12",
        "--device", "cpu",
    ]) == 0  # fmt: skip
    return recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return continuing_recipe(tmp_path_factory.mktemp("continued"))


@pytest.mark.gloo
def test_two_ranks_continue_videos_as_one_does_with_the_alarms_on(recipe, tmp_path):
    alone = run_layouts(0, recipe, {"alone": []})["alone"]
    assert load_config(recipe).alarms.enabled
    check_that_it_learns(alone, moves=1e-3)
    results = on_ranks(2, run_layouts, recipe, LAYOUTS, folder=tmp_path)
    for name in LAYOUTS:
        ranks = [rank[name] for rank in results]
        check_parity(name, ranks, alone, exact=name == "data")


def test_a_run_that_continues_videos_resumes_bit_for_bit(recipe):
    parts = in_two_parts(recipe, "resumed", "evaluation.prompts=null")
    assert_one_run(**parts)
    moved = max(line["policy/ratio_max"] for line in parts["whole"].metrics if "loss/kl" in line)
    assert moved > 1.01


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"video": "v.mp4"}, r"line 1: prompt 0 takes 0 latent frames of .*v.mp4: give both"),
        ({"video": 3, "video_frames": 3}, r"line 1: 'video' is 3, .*a path and whole numbers"),
        ({"video": "v.mp4", "video_frames": 7}, r"prompt 0 takes 7 .*multiple of the block of 3"),
        ({"video": "v.mp4", "video_frames": 18}, r"prompt 0 takes 18 .*at most 15"),
        ({"video": "v.mp4", "video_frames": 15}, r"prompt 0: no legal fork: the first 15 .* is 12"),
    ],
)
def test_beginnings_that_leave_no_room_are_refused_with_the_remedy(tmp_path, prompt, said):
    lines = [{"segments": ["a red square moves right"], **prompt}]
    with pytest.raises(ValueError, match=said):
        check_run(tiny_config(tmp_path, prompts=lines))
