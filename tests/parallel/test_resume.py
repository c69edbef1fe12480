"""A run that stops and resumes is the run that never stopped, bit for bit, under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import load_config
from tests.parallel.tiny_run import Trace, train_traced, write_recipe, write_strong_weights
from tests.ranks import on_ranks

# The policy that samples is copied at updates 0 and 3: at the resume, after 2, it is behind.
FOUR = ["num_updates=4", "checkpoint.every=2", "policy.rollouts_per_policy_sync=3"]
TWO = [*FOUR, "num_updates=2"]
FULL = ["policy.mode=full", "optimizer.lr=1e-3"]
TENSOR = ["parallel.tensor=2", "parallel.sequence_parallel=true"]


def resume_recipe(folder: Path) -> Path:
    """The tiny recipe, with weights that say something."""
    return write_recipe(folder, **write_strong_weights(folder))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return resume_recipe(tmp_path_factory.mktemp("resume"))


def run(recipe: Path, name: str, *overrides: str) -> Trace:
    """The recipe's run in a folder of that name."""
    return train_traced(load_config(recipe, [f"name={name}", *overrides]))


def in_two_parts(recipe: Path, name: str, *overrides: str) -> dict[str, Trace]:
    """A run of four updates; the same in two parts, `first` and `second`."""
    return {
        "whole": run(recipe, f"{name}_whole", *FOUR, *overrides),
        "first": run(recipe, name, *TWO, *overrides),
        "second": run(recipe, name, *FOUR, *overrides),
    }


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    """All tensors are equal, bit for bit."""
    assert ours.keys() == theirs.keys()
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not unequal, f"{where}: {len(unequal)} of {len(ours)} differ, first {unequal[:3]}"


def assert_one_run(whole: Trace, first: Trace, second: Trace) -> None:
    """The second part goes on from the first's bits and ends with those of the whole."""
    assert (first.first_update, second.first_update) == (0, 2)
    assert_same_bits(second.start, first.weights, "weights as loaded")
    assert_same_bits(second.weights, whole.weights, "weights at the end")
    assert_same_bits(second.moments, whole.moments, "moments at the end")
    assert second.metrics == whole.metrics
    for ours, theirs in zip(second.gradients, whole.gradients[2:], strict=True):
        assert_same_bits(ours, theirs, "gradients after the resume")


def assert_the_test_has_teeth(whole: Trace, first: Trace) -> None:
    """At the resume all slots differ, and what the resumed run does depends on each of them."""
    slots = {name.rsplit(".", 1)[1]: value for name, value in first.weights.items()
             if "blocks.0.self_attn.q.adapter.lora_B" in name}  # fmt: skip
    assert slots.keys() == {"current", "old", "reference", "ema"}
    assert not torch.equal(slots["current"], slots["old"])
    assert not torch.equal(slots["current"], slots["ema"])
    ratios = [line["policy/ratio_max"] for line in whole.metrics]
    assert ratios[0] == ratios[3] == 1
    assert min(ratios[1:3]) > 1.01
    assert all(line["loss/kl"] > 1e-6 for line in whole.metrics[1:])


def test_two_updates_and_two_more_are_four(recipe):
    parts = in_two_parts(recipe, "alone")
    assert_the_test_has_teeth(parts["whole"], parts["first"])
    assert_one_run(**parts)


def test_full_weights_resume_too(recipe):
    parts = in_two_parts(recipe, "full", *FULL)
    old = "slots.old.patch_embedding/weight"
    assert not torch.equal(parts["first"].weights[old], parts["whole"].weights[old])
    assert_one_run(**parts)


def test_another_seed_is_refused(recipe):
    first = run(recipe, "seeds", "num_updates=1", "checkpoint.every=1")
    with pytest.raises(ValueError, match=r"step_00000001 belongs to a run of seed 3, .* seed 4"):
        run(recipe, "seeds", "num_updates=2", "checkpoint.every=1", "seed=4")
    anew = run(recipe, "seeds", "num_updates=1", "checkpoint.every=0", "checkpoint.resume=false")
    assert anew.first_update == 0
    assert_same_bits(anew.weights, first.weights, "weights of the run started anew")


def _two_ranks(rank: int, recipe: Path) -> dict[str, Any]:
    return {
        "data": in_two_parts(recipe, "data"),
        "tensor": run(recipe, "tensor", *TWO, *TENSOR),
        "full": run(recipe, "tensor_full", *TWO, *TENSOR, *FULL),
    }


@pytest.mark.gloo
def test_two_ranks_resume_as_one_does_and_one_goes_on_from_two(recipe, tmp_path):
    results = on_ranks(2, _two_ranks, recipe, folder=tmp_path)
    for parts in (rank["data"] for rank in results):
        assert_one_run(**parts)
    for saved, overrides in (("tensor", []), ("full", FULL)):
        resumed = run(recipe, "tensor_full" if overrides else "tensor", *FOUR, *overrides)
        assert resumed.first_update == 2
        assert len(resumed.gradients) == 2
        assert_same_bits(resumed.start, results[0][saved].weights, f"{saved} saved by two ranks")
        alone = run(recipe, "alone_again", *FOUR, *overrides, "checkpoint.every=0")
        for name, value in alone.weights.items():
            torch.testing.assert_close(resumed.weights[name], value, rtol=0, atol=1e-5, msg=name)
