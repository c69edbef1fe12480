"""However the ranks are divided, the same recipe gives the same run: three updates of train.train.

A reordered float32 sum changes last bits, and the loop makes more of them: a video comes of 18
passes, after which its latents agree to 1e-6; an advantage divides differences of 0.3 between
rewards of size 6, the softmax divides energies by 0.1. Largest differences seen from one rank:

                            loss   gradient / largest   weights   which moved by
    LoRA, any layout        2e-6          3e-5           3e-6         1.4e-2
    full weights, TP 2 + SP 1e-6          6e-5           7e-7         3e-3

Adam divides each gradient by its own size, so one that is nothing but rounding would move its
weight by lr either way. Hence optimizer.eps 1e-4, against a median gradient of 1e-3; and the
gradients are compared too, before Adam sees them. Data ranks repeat one rank's bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_kvpo.config import load_config
from tests.parallel.tiny_run import (
    PROMPTS,
    Trace,
    differences,
    train_traced,
    write_recipe,
    write_strong_weights,
)
from tests.ranks import on_ranks

LOSS, GRADIENT, WEIGHT, METRIC = 1e-5, 3e-4, 1e-5, 1e-4
"""Losses absolute; gradients over the largest one; weights absolute; metrics over max(1, size)."""

FULL = ["policy.mode=full", "optimizer.lr=1e-3"]
SEQUENCE = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
TWO_RANKS = {
    "tensor": ["parallel.tensor=2"],
    "sequence": SEQUENCE,
    "context": ["parallel.context=2"],
    "branch": ["parallel.branch=2"],
    "data": [],
    "full": [*FULL, *SEQUENCE],
}
FOUR_RANKS = {"tensor and data": ["parallel.tensor=2"]}


def parity_recipe(folder: Path) -> Path:
    """A recipe with an evaluation, so that its videos are shared over ranks too."""
    held_out = folder / "held_out.jsonl"
    path = write_recipe(
        folder,
        evaluation={"prompts": str(held_out), "noises_per_prompt": 2, "filmstrips": 1},
        loss={"drift_coefficient": 1.0},
        optimizer={"bucket_mib": 0.002},  # several buckets
        **write_strong_weights(folder),
    )
    held_out.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(True)[:2]))
    assert len(PROMPTS) > 2
    return path


def run_layouts(
    rank: int, recipe: Path, layouts: dict[str, list[str]], device: str = "cpu"
) -> dict[str, Trace]:
    """The recipe once under each layout."""
    return {
        name: train_traced(load_config(recipe, [f"name={name}", f"device={device}", *overrides]))
        for name, overrides in layouts.items()
    }


def check_run(
    name: str, ranks: list[Trace], alone: Trace, *, slack: float = 1.0, exact: bool = False
) -> None:
    """Every rank has one rank's losses, gradients and weights, within `slack` x the tolerances
    above; `exact`: the weights at the end bit for bit."""
    for ours, theirs in zip(ranks[0].metrics, alone.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            limit = slack * (LOSS if key == "loss/total" else METRIC * max(1.0, abs(value)))
            assert abs(ours[key] - value) <= limit, f"{name}, update {ours['update']}: {key}"
    for rank in ranks:
        for update, (ours, theirs) in enumerate(zip(rank.gradients, alone.gradients, strict=True)):
            limit = slack * GRADIENT * largest(theirs)
            check_tensors(f"{name}, gradients of update {update}", ours, theirs, limit)
        check_tensors(f"{name}, weights at first", rank.start, alone.start, 0.0)
        limit = 0.0 if exact else slack * WEIGHT
        check_tensors(f"{name}, weights at last", rank.weights, alone.weights, limit)


def check_tensors(
    where: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float
) -> None:
    """No tensor is off by more than `limit`; nan is."""
    found = differences(ours, theirs)
    over = {name: f"{error:.3g}" for name, error in found.items() if not error <= limit}
    assert not over, f"{where}: off by more than {limit:.3g}: {over}"


def largest(tensors: dict[str, Tensor]) -> float:
    """The largest absolute value of all."""
    return max(float(tensor.abs().max()) for tensor in tensors.values())


def check_that_it_learns(alone: Trace, moves: float) -> None:
    """Nothing below is equal only because nothing happens."""
    assert len(alone.gradients) == 3
    assert largest(alone.gradients[-1]) > 0.01
    moved = differences(alone.weights, alone.start)
    assert all(moved[name] > moves for name in alone.gradients[0]), moved
    last_updates = [line for line in alone.metrics if "policy/ratio_max" in line][1:]
    assert last_updates[0]["policy/ratio_max"] > 1.05
    assert last_updates[0]["policy/advantage_std"] > 0.1
    assert all(abs(line["loss/total"]) > 100 * LOSS for line in last_updates)


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    recipe = parity_recipe(folder)
    return {"folder": folder, "recipe": recipe,
            **run_layouts(0, recipe, {"lora": [], "full weights": FULL})}  # fmt: skip


@pytest.mark.gloo
def test_two_ranks_train_as_one_however_they_are_divided(references, tmp_path):
    lora, full = references["lora"], references["full weights"]
    check_that_it_learns(lora, moves=1e-3)
    check_that_it_learns(full, moves=1e-5)
    recipe = references["recipe"]
    results = on_ranks(2, run_layouts, recipe, TWO_RANKS, folder=tmp_path)
    for name in TWO_RANKS:
        alone = full if name == "full" else lora
        check_run(name, [rank[name] for rank in results], alone, exact=name == "data")


@pytest.mark.gloo
def test_four_ranks_as_two_by_two_train_as_one(references, tmp_path):
    recipe = references["recipe"]
    results = on_ranks(4, run_layouts, recipe, FOUR_RANKS, folder=tmp_path)
    for name in FOUR_RANKS:
        check_run(name, [rank[name] for rank in results], references["lora"])
