"""Whole runs of pre-training on one rank: what they leave, and what they refuse to go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_kvpo.checkpoint.formats import open_checkpoint
from tests.unit.tiny_pretrain import LORA, recipe, run


def test_weights_that_a_run_leaves_begin_another_and_its_checkpoint_holds_both(tmp_path):
    made = run(recipe(tmp_path, "name=first", "checkpoint.every=4"))
    begun = run(recipe(tmp_path, "name=second", f"model.weights={made.written}", "fitting.steps=1"))
    averages = {
        name.removeprefix("slots.slots.ema.").replace("/", "."): value
        for name, value in made.weights.items()
        if name.startswith("slots.")
    }
    for name, value in averages.items():
        assert torch.equal(begun.start[name], value.bfloat16().float()), name
    saved = tmp_path / "first" / "checkpoints" / "step_00000004"
    for slot, expected in (("current", made.weights), ("ema", averages)):
        found = open_checkpoint(saved, slot=slot)
        assert (found.heads, found.layers, found.foreign) == (4, 2, ())
        assert found.shapes.keys() == averages.keys()
        for name in averages:
            assert torch.equal(found.read(name, None), expected[name]), (slot, name)
    assert not torch.equal(made.weights["head.head.weight"], averages["head.head.weight"])


def test_an_adapter_that_a_run_leaves_is_its_average_and_can_be_continued(tmp_path):
    made = run(recipe(tmp_path, "name=first", "checkpoint.every=4", *LORA))
    assert made.written.endswith("adapter")
    for adapter in (made.written, str(tmp_path / "first" / "checkpoints" / "step_00000004")):
        more = [f"trained.adapter={adapter}", "fitting.steps=1", f"name=from{len(adapter)}"]
        begun = run(recipe(tmp_path, *LORA, *more))
        slot = "ema" if adapter == made.written else "current"
        for name, value in begun.start.items():
            if name.endswith(".current"):
                expected = made.weights[name.removesuffix(".current") + f".{slot}"]
                assert torch.equal(value, expected), (name, slot)


def test_a_checkpoint_of_other_data_another_seed_or_more_steps_is_refused(tmp_path):
    every = ["checkpoint.every=2", "fitting.steps=2"]
    run(recipe(tmp_path, *every))
    for overrides, stream, words in (
        ([], {"origin": "others"}, "trained on the data set noise, this run has others: name"),
        (["seed=9"], {}, "belongs to a run of seed 3, this one has seed 9: give"),
        (["fitting.steps=1"], {}, "has 2 steps behind it, fitting.steps is 1: raise it"),
    ):
        with pytest.raises(ValueError, match=words):
            run(recipe(tmp_path, *every, *overrides), **stream)
    anew = run(recipe(tmp_path, *every, "checkpoint.resume=false"), origin="others")
    assert (anew.first_step, anew.steps) == (0, 2)


def test_no_average_takes_no_memory_and_leaves_the_last_weights(tmp_path):
    pytest.importorskip("tensorboard")
    told = ["log.costs=true", "log.tensorboard=true", "log.peak_tflops=1"]
    found = run(recipe(tmp_path, "fitting.ema_decay=0", "fitting.schedule=constant", *told))
    assert not [name for name in found.weights if name.startswith("slots.")]
    assert found.steps == 4
    _check_what_is_told(tmp_path / "pretrain")


def _check_what_is_told(folder: Path) -> None:
    """The curve says what a step cost, and TensorBoard what the curve says."""
    lines = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 0 < line["time/forward_and_backward_s"] < line["time/step_s"]
        assert line["speed/step_tokens_per_s"] > 0
        assert line["speed/step_mfu"] == line["speed/step_tflops"] > 0
        assert 2 * line["time/step_s"] < line["seconds"] + 1
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == lines[0].keys() - {"step"}
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(line["step"], pytest.approx(line["loss"])) for line in lines]


def test_a_damaged_checkpoint_is_passed_over_and_background_saves_leave_the_same_run(
    tmp_path,
):
    every = ["checkpoint.every=1", "checkpoint.keep=3"]
    whole = run(recipe(tmp_path, "name=whole", *every))
    aside = [*every, "name=aside", "checkpoint.background=true"]
    run(recipe(tmp_path, *aside))
    last = tmp_path / "aside" / "checkpoints" / "step_00000004"
    tensors = max(last.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(tensors.read_bytes())
    data[len(data) // 2] ^= 1
    tensors.write_bytes(data)
    again = run(recipe(tmp_path, *aside))
    assert (again.first_step, again.steps, len(again.losses)) == (3, 4, 1)
    said = (tmp_path / "aside" / "run.log").read_text()
    assert f"{tensors.name} holds other bytes than were written" in said
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value), name
    with pytest.raises(ValueError, match=r"resume is must and .* has 0 checkpoints"):
        run(recipe(tmp_path, "name=new", "checkpoint.every=1", "checkpoint.resume=must"))
