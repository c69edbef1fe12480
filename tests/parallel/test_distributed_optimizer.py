"""Shared moments (optimizer.distributed) train as whole ones do, and resume from and to any.

Without clipping the bits are the same. The clip divides by the gradient's norm, whose squares are
added up share by share: its last bits differ, and with them the weights by 4e-7 at most.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_kvpo.checkpoint.state import load, newest, save
from megatron_kvpo.config import OptimizerConfig, ParallelConfig
from megatron_kvpo.parallel.groups import Ranks, start_ranks, stop_ranks
from megatron_kvpo.training.optimizer import Optimizer, build_optimizer
from tests.parallel.test_parity import FULL, check_tensors, run_layouts
from tests.parallel.test_resume import assert_one_run, in_two_parts, resume_recipe
from tests.parallel.tiny import (
    CONFIG,
    Tiny,
    backward,
    own_samples,
    sample_loss,
    update_once,
    weights,
)
from tests.parallel.tiny_run import Trace
from tests.ranks import on_ranks

CLIPPED = 2e-6
"""Weights may differ by so much where the clip is felt."""

WHOLE = replace(CONFIG, grad_clip=1e9)
SHARED = replace(WHOLE, distributed=True)
TWO_RANKS = {
    "data": ParallelConfig(timeout_s=120),
    "branch": ParallelConfig(branch=2, timeout_s=120),
    "context": ParallelConfig(context=2, timeout_s=120),
    "tensor": ParallelConfig(tensor=2, timeout_s=120),
}
FOUR_RANKS = {"data x branch": TWO_RANKS["branch"], "data x tensor": TWO_RANKS["tensor"]}

RUNS = {
    "branch": ["parallel.branch=2", "optimizer.grad_clip=1e9"],
    "full, clipped": FULL,
}
"""Whole runs: rollouts, several backward passes a group, slots."""


def _build(ranks: Ranks, config: OptimizerConfig, seed: int = 0) -> tuple[Tiny, Optimizer]:
    model = Tiny(ranks, seed)
    if ranks.world == 4:  # tensor ranks then sum the gradient of what each has whole
        model.config.sequence_parallel = model.scale.sequence_parallel = True
    return model, build_optimizer(model, model.config, config, ranks)


def _run(ranks: Ranks, config: OptimizerConfig, updates: int = 3) -> tuple[dict, list[float]]:
    model, optimizer = _build(ranks, config)
    norms = [update_once(model, optimizer, update) for update in range(updates)]
    return weights(model), norms


def _same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[k].view(torch.int32), two[k].view(torch.int32)) for k in one)


def _in_parts(ranks: Ranks, config: OptimizerConfig) -> dict[str, Tensor]:
    """Weights after an update whose samples are summed each by itself, over two passes."""
    model, optimizer = _build(ranks, config)
    optimizer.zero_grad()
    for sample in own_samples(ranks):
        with optimizer.part():
            for half in (0.3, 0.7):
                (half * optimizer.loss_scale * sample_loss(model, 0, sample)).backward()
    optimizer.finalize()
    optimizer.step(0)
    return weights(model)


def _alarms(ranks: Ranks) -> dict[str, Any]:
    """What must stop all ranks, or be seen by them."""
    model, optimizer = _build(ranks, SHARED)
    found: dict[str, Any] = {}
    for name, index in (("nan", 0), ("inf", -1)):  # a number of the first rank's share, and not
        optimizer.zero_grad()
        backward(model, optimizer, 0)
        if ranks.rank == 1:
            with torch.no_grad():
                (model.scale if index == 0 else model.up.weight).main_grad.flatten()[index] = float(
                    name
                )
        optimizer.finalize()
        before = weights(model)
        with pytest.raises(ValueError, match=r"update 7 has gradient norm (nan|inf): no weight"):
            optimizer.step(7)
        found[name] = _same_bits(before, weights(model))
    found["recovered"] = math.isfinite(update_once(model, optimizer, 0))
    optimizer.zero_grad()
    backward(model, optimizer, 1)
    optimizer.finalize()
    found["equal"] = optimizer.check_gradients_equal()
    with torch.no_grad():
        model.scale[1] += 0.25 * ranks.rank
    found["unequal"] = optimizer.check_gradients_equal()
    return found


def _tree(model: Tiny, optimizer: Optimizer) -> dict[str, Any]:
    sharded = model.sharded()
    return {"model": sharded, "optimizer": optimizer.sharded_state_dict(sharded)}


def _save(ranks: Ranks, config: OptimizerConfig, folder: Path, updates: int) -> None:
    model, optimizer = _build(ranks, config)
    for update in range(updates):
        update_once(model, optimizer, update)
    save(folder, updates, _tree(model, optimizer), ranks, keep=1)


def _resume(ranks: Ranks, config: OptimizerConfig, folder: Path, until: int) -> dict[str, Tensor]:
    """From the checkpoint there to that update; the model began elsewhere."""
    path = newest(folder)
    assert path is not None
    model, optimizer = _build(ranks, config, seed=9)
    loaded = load(path, _tree(model, optimizer), ranks)
    model.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    for update in range(int(path.name.removeprefix("step_")), until):
        update_once(model, optimizer, update)
    return weights(model)


def _resumes(ranks: Ranks, folder: Path) -> dict[str, bool]:
    """Two updates, save, resume, two more: shared and whole in all four ways, against four."""
    expected, _ = _run(ranks, WHOLE, 4)
    kinds = {"whole": WHOLE, "shared": SHARED}
    found = {}
    for saved, config in kinds.items():
        for updates in (0, 2):
            own = folder / f"{saved} {updates}"
            _save(ranks, config, own, updates)
            for resumed, other in kinds.items():
                got = _resume(ranks, other, own, 4)
                found[f"{own.name} to {resumed}"] = _same_bits(got, expected)
    return found


def _both(ranks: Ranks) -> dict[str, Any]:
    clipped = replace(SHARED, grad_clip=CONFIG.grad_clip)
    return {
        "whole": _run(ranks, WHOLE), "shared": _run(ranks, SHARED),
        "whole, clipped": _run(ranks, CONFIG), "shared, clipped": _run(ranks, clipped),
        "whole, parts": _in_parts(ranks, WHOLE), "shared, parts": _in_parts(ranks, SHARED),
    }  # fmt: skip


def _check(results: list[dict[str, Any]], layouts: dict[str, ParallelConfig]) -> None:
    for name in layouts:
        for got in (result[name] for result in results):
            assert _same_bits(got["shared"][0], got["whole"][0]), name
            assert got["shared"][1] == pytest.approx(got["whole"][1], rel=1e-6), name
            assert not _same_bits(got["whole"][0], got["whole, clipped"][0]), "no clip was felt"
            check_tensors(name, got["shared, clipped"][0], got["whole, clipped"][0], CLIPPED)
            assert _same_bits(got["shared, parts"], got["whole, parts"]), name


def _on_two(rank: int, recipe: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, config in TWO_RANKS.items():
        ranks = start_ranks(config, "cpu")
        found[name] = _both(ranks)
        if name == "data":
            found["resumes"] = _resumes(ranks, recipe.parent / "tiny")
            found["alarms"] = _alarms(ranks)
        stop_ranks()
    share = ["optimizer.distributed=true"]
    shared = {f"{name}, shared": [*how, *share] for name, how in RUNS.items()}
    found["runs"] = run_layouts(rank, recipe, {**RUNS, **shared})
    found["parts"] = in_two_parts(recipe, "parts", *share, *FULL)
    return found


def _numbers(trace: Trace) -> int:
    """Of the moments on this rank."""
    return sum(value.numel() for key, value in trace.moments.items() if "exp_avg" in key)


@pytest.mark.gloo
def test_two_ranks_that_share_moments_train_resume_and_stop_as_two_that_do_not(tmp_path):
    recipe = resume_recipe(tmp_path / "runs")
    results = on_ranks(2, _on_two, recipe, folder=tmp_path)
    _check(results, TWO_RANKS)
    for result in results:
        assert set(result["resumes"].values()) == {True}, result["resumes"]
        assert result["alarms"] == {"nan": True, "inf": True, "recovered": True, "equal": 0.0,
                                    "unequal": pytest.approx(0.25)}  # fmt: skip
        assert_one_run(**result["parts"])
    for name in RUNS:
        held = []
        for runs in (result["runs"] for result in results):
            ours, theirs = runs[f"{name}, shared"], runs[name]
            assert len(ours.gradients) == 3
            limit = CLIPPED if "clipped" in name else 0.0
            check_tensors(f"{name}, all slots", ours.weights, theirs.weights, limit)
            held.append(_numbers(ours))
        assert sum(held) == _numbers(theirs), "moments are missing, or kept twice"
        assert max(held) < 0.51 * sum(held)
    _one_rank_goes_on(recipe.parent / "tiny" / "shared 2")


def _one_rank_goes_on(saved: Path) -> None:
    """From what two ranks that shared had saved."""
    ranks = start_ranks(TWO_RANKS["data"], "cpu")
    try:
        expected, _ = _run(ranks, WHOLE, 4)
        for kind in (WHOLE, SHARED):
            check_tensors("one rank", _resume(ranks, kind, saved, 4), expected, 2e-6)
    finally:
        stop_ranks()


def _on_four(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, config in FOUR_RANKS.items():
        found[name] = _both(start_ranks(config, "cpu"))
        stop_ranks()
    return found


@pytest.mark.gloo
def test_two_by_two_ranks_that_share_moments_train_as_four_that_do_not(tmp_path):
    _check(on_ranks(4, _on_four, folder=tmp_path), FOUR_RANKS)
