from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.parallel.groups import Ranks, start_ranks, stop_ranks
from megatron_kvpo.training.optimizer import build_optimizer
from tests.parallel.tiny import (
    CONFIG,
    HIDDEN,
    SAMPLES,
    Tiny,
    backward,
    sample_loss,
    update_once,
    weights,
    whole_weights,
)
from tests.ranks import on_ranks

UPDATES = 5
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2),
    "context": ParallelConfig(context=2),
    "branch": ParallelConfig(branch=2),
    "data": ParallelConfig(),
}


def _by_torch() -> tuple[dict[str, Tensor], list[float]]:
    """The same updates with torch alone: whole weights, one process, AdamW, norm clipping."""
    whole = {k: nn.Parameter(v) for k, v in whole_weights(0).items()}
    trained = [p for name, p in whole.items() if name != "frozen"]
    adam = torch.optim.AdamW(trained, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps,
                             weight_decay=CONFIG.weight_decay)  # fmt: skip

    def model(x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ whole["up.weight"].T + whole["up.bias"])
        return hidden @ whole["down.weight"].T * whole["scale"] + whole["frozen"]

    norms = []
    for update in range(UPDATES):
        adam.zero_grad()
        sum(sample_loss(model, update, i) / SAMPLES for i in range(SAMPLES)).backward()
        norms.append(nn.utils.clip_grad_norm_(trained, CONFIG.grad_clip).item())
        adam.param_groups[0]["lr"] = CONFIG.lr * min(1.0, (update + 1) / CONFIG.warmup_updates)
        adam.step()
    return {name: p.detach() for name, p in whole.items()}, norms


def _same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[k].view(torch.int32), two[k].view(torch.int32)) for k in one)


def _alarms(ranks: Ranks) -> dict[str, Any]:
    """What must stop or not move the weights, on two data ranks."""
    model = Tiny(ranks, seed=0)
    optimizer = build_optimizer(model, model.config, CONFIG, ranks)
    found: dict[str, Any] = {"norm before": optimizer.gradient_norm}
    with pytest.raises(RuntimeError, match="call finalize before step"):
        optimizer.step(0)
    optimizer.zero_grad()
    backward(model, optimizer, 0)
    optimizer.finalize()
    with pytest.raises(RuntimeError, match="reduced already"):
        optimizer.finalize()
    found["equal"] = optimizer.check_gradients_equal()
    with torch.no_grad():
        model.scale.main_grad[1] += 0.25 * ranks.rank
    found["unequal"] = optimizer.check_gradients_equal()

    before = weights(model)
    optimizer.zero_grad()
    loss = sample_loss(model, 0, 0)
    (loss * (math.inf if ranks.rank == 1 else 1.0)).backward()
    optimizer.finalize()
    with pytest.raises(ValueError, match=r"update 7 has gradient norm (nan|inf): no weight was"):
        optimizer.step(7)
    found["after non-finite"] = _same_bits(before, weights(model))
    found["recovered"] = math.isfinite(update_once(model, optimizer, 0))
    found["moved"] = not _same_bits(before, weights(model))

    unmoved = Tiny(ranks, seed=0)
    still = build_optimizer(unmoved, model.config, replace(CONFIG, lr=0.0), ranks)
    start = [p.detach().clone() for p in still.parameters]
    for update in range(2):
        update_once(unmoved, still, update)
    found["lr 0"] = all(torch.equal(a, b) for a, b in zip(start, still.parameters, strict=True))
    return found


def _train(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, config in LAYOUTS.items():
        ranks = start_ranks(config, "cpu")
        model = Tiny(ranks, seed=0)
        optimizer = build_optimizer(model, model.config, CONFIG, ranks)
        norms = [update_once(model, optimizer, update) for update in range(UPDATES)]
        found[name] = (weights(model), norms, optimizer.gradient_norm, optimizer.name)
        if name == "data":
            found["alarms"] = _alarms(ranks)
        stop_ranks()
    return found


@pytest.mark.gloo
def test_every_layout_of_two_ranks_trains_as_torch_does_alone_and_alarms_go_off(tmp_path):
    expected, norms = _by_torch()
    results = on_ranks(2, _train, folder=tmp_path)
    for name in LAYOUTS:
        for rank, result in enumerate(results):
            got, got_norms, last, adam = result[name]
            assert last == got_norms[-1]
            assert adam == "torch AdamW"
            assert got_norms == pytest.approx(norms, rel=1e-5), (name, rank)
            for key, value in expected.items():
                share = value
                if name == "tensor" and key in ("up.weight", "up.bias", "down.weight"):
                    share = value.split(HIDDEN // 2, dim=int(key == "down.weight"))[rank]
                torch.testing.assert_close(got[key], share, rtol=0, atol=2e-6, msg=f"{name} {key}")
    for result in results:
        alarms = result["alarms"]
        assert math.isnan(alarms.pop("norm before"))
        assert alarms == {"equal": 0.0, "unequal": pytest.approx(0.25), "after non-finite": True,
                          "recovered": True, "moved": True, "lr 0": True}  # fmt: skip
    for name in ("context", "branch", "data"):
        assert _same_bits(results[0][name][0], results[1][name][0]), "replicas drifted apart"


def test_the_clip_and_the_warm_up_are_felt_in_this_test():
    """Else the comparison with torch would not see them."""
    _, norms = _by_torch()
    assert min(norms) > CONFIG.grad_clip
    assert 1 < CONFIG.warmup_updates < UPDATES


def test_a_model_that_cannot_be_trained_is_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="0 trainable parameters"):
        build_optimizer(frozen, None, CONFIG, None)  # type: ignore[arg-type]
    half = nn.Linear(2, 2).bfloat16()
    with pytest.raises(ValueError, match="2 trainable parameters are not float32"):
        build_optimizer(half, None, CONFIG, None)  # type: ignore[arg-type]
