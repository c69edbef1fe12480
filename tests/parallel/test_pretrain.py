"""Pre-training is one run however ranks share it, and resumes bit for bit, also after SIGTERM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_kvpo.model.recompute import Recompute
from megatron_kvpo.model.specs import _Row
from tests.ranks import on_ranks
from tests.unit.tiny_pretrain import LORA, Trace, recipe, run

SEQUENCE = ["parallel.tensor=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "data": [],
    "micro": ["fitting.micro_rows=1"],
    "sequence": SEQUENCE,
    "tensor": ["parallel.tensor=2"],
    "context": ["parallel.context=2", "model.recompute=true"],
    "diffusion": ["parallel.context=2", "fitting.forcing=diffusion", "fitting.own_estimates_from=1",
                  "fitting.weighting=bell", "fitting.sampler_levels=0.3"],
    "lora": [*SEQUENCE, *LORA],
}  # fmt: skip
ALONE = {"teacher": [], "diffusion": LAYOUTS["diffusion"][1:], "lora": LORA}
HELD = {name: LAYOUTS[name] for name in ("sequence", "tensor", "context", "lora")}
PLANS = {"again": (0, 0, 0, 0), "held": (0, 0, 2, 2)}
RESUMED = {
    "data": [], "distributed": ["optimizer.distributed=true"], "sequence": [*SEQUENCE, *LORA],
}  # fmt: skip


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float, where: str) -> None:
    """Every tensor, relative to its largest value or a hundredth of the largest of all."""
    assert ours.keys() == theirs.keys()
    floor = max(float(t.abs().max()) for t in theirs.values()) / 100
    for name, value in theirs.items():
        size = max(float(value.abs().max()), floor)
        assert float((ours[name] - value).abs().max()) < limit * size, f"{where}: {name}"


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor], where: str) -> None:
    assert ours.keys() == theirs.keys()
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not unequal, f"{where}: {len(unequal)} differ, first {unequal[:3]}"


def _noted(function: Callable[..., Any], notes: list[int]) -> Callable[..., Any]:
    return lambda *args: notes.append(1) or function(*args)


def _train(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: run(recipe(folder, f"name={name}", *more)) for name, more in LAYOUTS.items()
    }
    for name, more in HELD.items():
        for plan, counts in PLANS.items():
            sums = []
            with (
                mock.patch.object(Recompute, "_kept", lambda *_, counts=counts: counts),
                mock.patch.object(_Row, "_summed", _noted(_Row._summed, sums)),
            ):
                found[f"{name}_{plan}"] = run(recipe(folder, f"name={name}_{plan}", *more))
            found[f"{name}_{plan}_sums"] = len(sums)
    for name, more in RESUMED.items():
        every = [*more, "checkpoint.every=2"]
        found[f"{name}_whole"] = run(recipe(folder, f"name={name}_whole", *every))
        found[f"{name}_first"] = run(recipe(folder, f"name={name}_half", *every), ends_at=1)
        found[f"{name}_second"] = run(recipe(folder, f"name={name}_half", *every))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Trace]]:
    folder = tmp_path_factory.mktemp("two")
    return on_ranks(2, _train, folder, folder=folder)


@pytest.mark.gloo
def test_two_ranks_train_as_one_however_they_are_divided(two, tmp_path):
    alone = {name: run(recipe(tmp_path, f"name={name}", *m)) for name, m in ALONE.items()}
    for name in LAYOUTS:
        one = alone.get(name, alone["teacher"])
        assert len(one.gradients) == len(two[0][name].gradients) == 4
        for step, gradients in enumerate(one.gradients[:3]):  # the third with own estimates
            close(two[0][name].gradients[step], gradients, 2e-4, f"{name}, step {step}")
        mean = [sum(losses) / 2 for losses in zip(*(r[name].losses for r in two), strict=True)]
        assert mean == pytest.approx(one.losses, rel=1e-4), name
    moved = alone["teacher"]
    silent = [n for n, g in moved.gradients[0].items() if not g.any()]
    assert not silent, "no gradient"
    own = moved.losses[2:]
    other = run(recipe(tmp_path, "name=never", "fitting.own_estimates_from=1")).losses[2:]
    assert own != pytest.approx(other, rel=1e-3), "own estimates change nothing"


@pytest.mark.gloo
@pytest.mark.parametrize("name", HELD)
def test_held_results_change_no_bit_and_are_summed_over_tensor_ranks_once(two, name):
    """Two layers of three sums, in four steps and two estimates; the second run leaves one out."""
    for rank in two:
        again, held = (rank[f"{name}_{plan}"] for plan in PLANS)
        assert held.losses == again.losses
        for ours, theirs in zip(held.gradients, again.gradients, strict=True):
            same_bits(ours, theirs, name)
        same_bits(held.weights, again.weights, name)
        sums = [rank[f"{name}_{plan}_sums"] for plan in PLANS]
        assert sums == ([0, 0] if name == "context" else [60, 52])


@pytest.mark.gloo
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_sigterm_ends_resumes_and_ends_with_the_same_bits(two, name):
    """The last data rank alone is told, in its second step; both save after it."""
    for rank in two:
        whole, first, second = (rank[f"{name}_{part}"] for part in ("whole", "first", "second"))
        assert (first.steps, first.written) == (2, "")
        assert (second.first_step, second.steps, whole.steps) == (2, 4, 4)
        assert whole.losses == [*first.losses, *second.losses]
        same_bits(second.weights, whole.weights, "weights and averages at the end")
        for ours, theirs in zip(second.moments, whole.moments, strict=True):
            assert torch.equal(ours, theirs)
        assert any(not torch.equal(second.start[n], w) for n, w in whole.start.items())
        assert whole.written.endswith("adapter" if name == "sequence" else ".safetensors")
