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


def _recipe(folder: Path) -> Path:
    """A recipe with an evaluation, so that its videos are shared over ranks too."""
    held_out = folder / "held_out.jsonl"
    path = write_recipe(
        folder,
        evaluation={"prompts": str(held_out), "noises_per_prompt": 2, "filmstrips": 1},
        loss={"drift_coefficient": 1.0},
        **write_strong_weights(folder),
    )
    held_out.write_text("".join((folder / "prompts.jsonl").read_text().splitlines(True)[:2]))
    assert len(PROMPTS) > 2
    return path


def _run(rank: int, recipe: Path, layouts: dict[str, list[str]]) -> dict[str, Trace]:
    return {
        name: train_traced(load_config(recipe, [f"name={name}", *overrides]))
        for name, overrides in layouts.items()
    }


def _check(name: str, ranks: list[Trace], alone: Trace) -> None:
    """Every rank has one rank's losses, gradients and weights, within the tolerances above."""
    for ours, theirs in zip(ranks[0].metrics, alone.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            limit = LOSS if key == "loss/total" else METRIC * max(1.0, abs(value))
            assert abs(ours[key] - value) <= limit, f"{name}, update {ours['update']}: {key}"
    for rank in ranks:
        for update, (ours, theirs) in enumerate(zip(rank.gradients, alone.gradients, strict=True)):
            _check_tensors(f"{name}, gradients of update {update}", ours, theirs,
                           GRADIENT * _largest(theirs))  # fmt: skip
        _check_tensors(f"{name}, weights at first", rank.start, alone.start, 0.0)
        limit = 0.0 if name == "data" else WEIGHT
        _check_tensors(f"{name}, weights at last", rank.weights, alone.weights, limit)


def _check_tensors(
    where: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float
) -> None:
    found = differences(ours, theirs)
    worst = max(found, key=found.__getitem__)
    assert found[worst] <= limit, f"{where}: {worst} is off by {found[worst]:.3g}"


def _largest(tensors: dict[str, Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


def _check_that_it_learns(alone: Trace, moves: float) -> None:
    """Nothing below is equal only because nothing happens."""
    assert len(alone.gradients) == 3
    assert _largest(alone.gradients[-1]) > 0.01
    moved = differences(alone.weights, alone.start)
    assert all(moved[name] > moves for name in alone.gradients[0]), moved
    last_updates = [line for line in alone.metrics if "policy/ratio_max" in line][1:]
    assert last_updates[0]["policy/ratio_max"] > 1.05
    assert last_updates[0]["policy/advantage_std"] > 0.1
    assert all(abs(line["loss/total"]) > 100 * LOSS for line in last_updates)


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    recipe = _recipe(folder)
    return {"folder": folder, "recipe": recipe,
            **_run(0, recipe, {"lora": [], "full weights": FULL})}  # fmt: skip


@pytest.mark.gloo
def test_two_ranks_train_as_one_however_they_are_divided(references, tmp_path):
    lora, full = references["lora"], references["full weights"]
    _check_that_it_learns(lora, moves=1e-3)
    _check_that_it_learns(full, moves=1e-5)
    results = on_ranks(2, _run, references["recipe"], TWO_RANKS, folder=tmp_path, limit_s=300)
    for name in TWO_RANKS:
        _check(name, [rank[name] for rank in results], full if name == "full" else lora)


@pytest.mark.gloo
def test_four_ranks_as_two_by_two_train_as_one(references, tmp_path):
    results = on_ranks(4, _run, references["recipe"], FOUR_RANKS, folder=tmp_path, limit_s=300)
    for name in FOUR_RANKS:
        _check(name, [rank[name] for rank in results], references["lora"])
