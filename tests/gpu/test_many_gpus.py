"""Several GPUs through NCCL do what one does: the golden runs, an update, a whole run, a resume.

Every run has processes of its own, one GPU each: this process's Megatron may have been told to use
the CPU. Helpers take the device, so that CPU ranks can run them too. There the layouts of an update
were off from one rank by at most

                energies   advantages   losses   slopes   gradients
    float32       4e-7        4e-5       3e-7     3e-5       3e-5
    bfloat16      1e-2         0         8e-3     2e-2       6e-3

A GPU chooses kernels by shape and so rounds in more ways: hence the room in the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_kvpo.algorithm.loss import energy_weights
from megatron_kvpo.parallel.collect import gather_rows
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.records import RewardTable, RolloutGroup
from megatron_kvpo.reward.composite import ScoredGroup
from tests.parallel import test_longlive_layouts, test_parity, test_resume
from tests.parallel.test_parity import SEQUENCE, check_tensors, largest
from tests.parallel.tiny_run import Trace, whole_gradients
from tests.ranks import on_ranks
from tests.unit import small
from tools.golden import TOLERANCES, Dtype

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 CUDA devices"),
]

LIMIT_S = 500
"""A launch compiles its kernels first."""

TWO = {
    "tensor": ["parallel.tensor=2"],
    "sequence": SEQUENCE,
    "context": ["parallel.context=2"],
    "branch": ["parallel.branch=2"],
    "data": [],
}
FOUR = {
    "sequence and branch": [*SEQUENCE, "parallel.branch=2"],
    "context and branch": ["parallel.context=2", "parallel.branch=2"],
}

LIMITS: dict[Dtype, dict[str, float]] = {
    "float32": {"energies": 1e-4, "advantages": 3e-4, "losses": 1e-5, "slopes": 3e-4,
                "gradients": 3e-4},
    "bfloat16": {"energies": 5e-2, "advantages": 1e-6, "losses": 3e-2, "slopes": 5e-2,
                 "gradients": 5e-2},
}  # fmt: skip
"""Over the largest value of each kind; losses absolute, their ratios and advantages are near 1."""

SLACK = 3.0
"""Of a whole run, on the limits of tests/parallel/test_parity.py, which are for CPU ranks."""


@dataclass(frozen=True)
class Update:
    """What one update computed, of all prompts and whole weights."""

    values: dict[str, Tensor]
    """Energies by three policies [3, P, G]; advantages and slopes dL/dE [P, G]; the loss."""

    gradients: dict[str, Tensor]
    """Of the adapters, reduced. In bfloat16 of fixed slopes: those of a loss sum to 0 over a group,
    which leaves little more than the rounding of what its branches have in common."""

    unequal: float
    """Largest difference of the reduced gradients between ranks that hold the same weights."""


class DrawnScorer:
    """Rewards out of coordinates.

    An advantage divides differences of rewards: those of bfloat16 rollouts are mostly rounding.
    """

    def send_group(self, group: RolloutGroup) -> ScoredGroup:
        """See Scorer.send_group."""
        device, index = group.latent_NFCHW.device, group.prompt.index
        rows = [noise((2, 2), "rewards", index, n, device=device) for n in group.sequences]
        local_KN, global_KN = torch.stack(rows, dim=-1)
        return ScoredGroup(
            RewardTable(components=("one", "two"), weights=(1.0, 2.0), local_KN=local_KN,
                        global_KN=global_KN)
        )  # fmt: skip


def update_of(device: str, dtype: Dtype, *overrides: str) -> Update:
    """One update of the small model, of policies that all differ."""
    config = small.config(*overrides)
    ranks = start_ranks(config.parallel, device)  # type: ignore[arg-type]
    try:
        tiny = small.build(
            ranks, f"device={device}", f"model.dtype={dtype}", "energy.temperature=0.1", *overrides
        )
        tiny.stir("current", "old", "reference", size=0.05)
        if dtype == "bfloat16":
            tiny.stages.scorer = DrawnScorer()  # type: ignore[assignment]
        return _update(tiny)
    finally:
        stop_ranks()


def _update(tiny: small.Small) -> Update:
    stages, optimizer, config = tiny.stages, tiny.policy.optimizer, tiny.config
    groups = stages.explore(0)
    advantage_PG, scale_P, _ = stages.advantages(0, groups, stages.score(groups))
    current, old, reference = (
        stages.energies(0, groups, slot).branch_PG for slot in ("current", "old", "reference")
    )
    loss, weight_PG = energy_weights(
        current, old, reference, advantage_PG, scale_P, config.energy.temperature, config.loss
    )
    pushed_PG = weight_PG  # or, so that branches add up, what `Update.gradients` says
    if config.model.dtype == "bfloat16":
        order_G = torch.arange(1.0, 1 + weight_PG.shape[1], device=weight_PG.device)
        pushed_PG = (order_G / weight_PG.numel()).expand_as(weight_PG)
    optimizer.zero_grad()
    stages.backward(0, groups, pushed_PG)
    optimizer.finalize()
    for sampled in groups:
        sampled.release()

    def whole(own_P: Tensor) -> Tensor:
        """Of all data ranks, which share the prompts evenly."""
        axis = tiny.ranks.data
        return gather_rows(own_P, axis, [len(own_P)] * axis.size).cpu()

    return Update(
        values={
            "energies": torch.stack([whole(e) for e in (current, old, reference)]),
            "advantages": whole(advantage_PG),
            "losses": whole(loss.loss[None]).mean(),
            "slopes": whole(weight_PG) / tiny.ranks.data.size,
        },
        gradients=whole_gradients(tiny.policy),
        unequal=optimizer.check_gradients_equal(),
    )


def updates_of(
    rank: int, layouts: dict[str, list[str]], device: str
) -> dict[tuple[Dtype, str], Update]:
    """An update in each dtype under each layout."""
    return {
        (dtype, name): update_of(device, dtype, *overrides)
        for dtype in LIMITS
        for name, overrides in layouts.items()
    }


def check_updates(
    ranks: list[dict[tuple[Dtype, str], Update]], alone: dict[tuple[Dtype, str], Update]
) -> None:
    """Every rank has what one rank has, and the same gradients as its replicas."""
    for found in ranks:
        for (dtype, name), ours in found.items():
            theirs, limits = alone[dtype, "alone"], LIMITS[dtype]
            assert ours.unequal == 0.0, f"{name}, {dtype}"
            for kind, value in theirs.values.items():
                scale = 1.0 if kind == "losses" else float(value.abs().max())
                limit = limits[kind] * scale
                check_tensors(f"{name}, {dtype}", {kind: ours.values[kind]}, {kind: value}, limit)
            limit = limits["gradients"] * largest(theirs.gradients)
            check_tensors(f"{name}, {dtype}, gradients", ours.gradients, theirs.gradients, limit)


def check_teeth(alone: dict[tuple[Dtype, str], Update]) -> None:
    """Nothing is equal only because nothing happens."""
    for update in alone.values():
        assert (update.values["energies"] > 1e-3).all()
        assert (update.values["advantages"].std(dim=1, correction=0) > 0.03).all()
        assert update.values["losses"].abs() > 1e-3
        assert (update.values["slopes"].std(dim=1, correction=0) > 0.03).all()
        assert all(gradient.any() for gradient in update.gradients.values())


def golden_errors(rank: int, device: str) -> dict[Dtype, dict[tuple[str, str], dict[str, float]]]:
    """Errors of both golden files under each layout, in each dtype."""
    return {dtype: test_longlive_layouts.errors_of(rank, device, dtype) for dtype in LIMITS}


def write_recipes(rank: int, folder: Path) -> dict[str, Path]:
    """The recipes of the runs below."""
    return {
        "parity": test_parity.parity_recipe(folder / "parity"),
        "resume": test_resume.resume_recipe(folder / "resume"),
    }


def runs_in_two_parts(rank: int, recipe: Path, device: str) -> dict[str, dict[str, Trace]]:
    """Whole runs, and the same in two parts; of one more the first part only."""
    place = (f"device={device}", "parallel.deterministic=true")
    saved = test_resume.run(recipe, "saved", *test_resume.TWO, *SEQUENCE, *place)
    return {
        "data": test_resume.in_two_parts(recipe, "data", *place),
        "sequence": test_resume.in_two_parts(recipe, "sequence", *SEQUENCE, *place),
        "context": test_resume.in_two_parts(recipe, "context", *TWO["context"], *place),
        "saved": {"first": saved},
    }


def go_on(rank: int, recipe: Path, device: str) -> Trace:
    """The second part of what two ranks saved, on one."""
    return test_resume.run(recipe, "saved", *test_resume.FOUR, f"device={device}")


def check_resumed(
    ranks: list[dict[str, dict[str, Trace]]], resumed: Trace, names: Sequence[str]
) -> None:
    """Two parts are the whole on every rank; one rank takes what two have saved."""
    for parts in ranks:
        for name in names:
            test_resume.assert_one_run(**parts[name])
    test_resume.assert_the_test_has_teeth(ranks[0]["data"]["whole"], ranks[0]["data"]["first"])
    assert resumed.first_update == 2
    assert len(resumed.gradients) == 2
    saved = ranks[0]["saved"]["first"].weights
    test_resume.assert_same_bits(resumed.start, saved, "weights that two ranks saved")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[tuple[Dtype, str], Update]:
    """One GPU's updates."""
    folder = tmp_path_factory.mktemp("alone")
    (found,) = on_ranks(1, updates_of, {"alone": []}, "cuda", folder=folder, limit_s=LIMIT_S,
                        device="cuda")  # fmt: skip
    check_teeth(found)
    return found


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    (paths,) = on_ranks(1, write_recipes, folder, folder=folder, limit_s=LIMIT_S)
    return paths


def test_two_gpus_compute_the_update_of_one(alone, tmp_path):
    ranks = on_ranks(2, updates_of, TWO, "cuda", folder=tmp_path, limit_s=LIMIT_S, device="cuda")
    check_updates(ranks, alone)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs 4 CUDA devices")
def test_four_gpus_compute_the_update_of_one(alone, tmp_path):
    ranks = on_ranks(4, updates_of, FOUR, "cuda", folder=tmp_path, limit_s=LIMIT_S, device="cuda")
    check_updates(ranks, alone)


def test_the_golden_runs_hold_over_two_gpus(tmp_path):
    ranks = on_ranks(2, golden_errors, "cuda", folder=tmp_path, limit_s=LIMIT_S, device="cuda")
    for found in ranks:
        for dtype, errors in found.items():
            test_longlive_layouts.check_errors(errors, TOLERANCES[dtype])


def test_two_gpus_train_as_one_however_they_are_divided(recipes, tmp_path):
    recipe, run = recipes["parity"], test_parity.run_layouts
    (one,) = on_ranks(1, run, recipe, {"lora": []}, "cuda", folder=tmp_path, limit_s=LIMIT_S,
                      device="cuda")  # fmt: skip
    test_parity.check_that_it_learns(one["lora"], moves=1e-3)
    ranks = on_ranks(2, run, recipe, TWO, "cuda", folder=tmp_path, limit_s=LIMIT_S, device="cuda")
    for name in TWO:
        test_parity.check_run(name, [rank[name] for rank in ranks], one["lora"], slack=SLACK)


def test_a_run_saved_by_two_gpus_resumes_to_the_same_bits(recipes, tmp_path):
    recipe = recipes["resume"]
    ranks = on_ranks(2, runs_in_two_parts, recipe, "cuda", folder=tmp_path, limit_s=LIMIT_S,
                     device="cuda")  # fmt: skip
    (resumed,) = on_ranks(1, go_on, recipe, "cuda", folder=tmp_path, limit_s=LIMIT_S,
                          device="cuda")  # fmt: skip
    check_resumed(ranks, resumed, ("data", "sequence", "context"))
