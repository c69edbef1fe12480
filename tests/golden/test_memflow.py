"""Our memory bank is MemFlow's, number by number, and the tool that says so can also say no."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_kvpo.config import ParallelConfig
from tests import quiet
from tools import golden as tool
from tools.golden import GoldenFile, Largest, replay_file

FILE = Path(__file__).with_name("memflow_tiny.safetensors")

TOLERANCE = 2e-5


_quiet_afterwards = quiet.quiet_afterwards


@pytest.fixture(scope="module")
def golden():
    """Fourteen blocks: the bank fills, chooses, repeats itself, and the text switches at 30."""
    return replay_file(FILE, ParallelConfig(timeout_s=120))


@pytest.mark.parametrize("run", ["stream", "bank"])
def test_every_number_of_the_public_model_is_repeated(golden, run):
    assert golden.errors[run] < TOLERANCE


def test_no_recorded_number_is_left_out(golden):
    tensors = golden.golden.tensors
    inputs = ("weights.", "text.")
    results = {n for n in tensors if not n.startswith(inputs) and not n.endswith(".eps")}
    assert results == golden.compared
    assert sum(name.endswith("bank_k_norms") for name in results) == 14


def test_what_is_recorded_needs_the_quirks_and_the_bank(tmp_path):
    """Another memory is far off, so the comparison sees it."""
    for changed in ({"reference_quirks": False}, {"record_interval_blocks": 2}):
        errors = replay_file(rewritten(tmp_path, **changed), ParallelConfig(timeout_s=120)).errors
        assert errors["stream"] > 10 * TOLERANCE, changed
        assert errors["bank"] > 10 * TOLERANCE, changed


def rewritten(folder: Path, drop: str | None = None, **changed: object) -> Path:
    """A copy of the file with other sizes; None drops one. `drop` drops tensors by their start."""
    with safe_open(FILE, "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        sizes = json.loads(file.metadata()["config"]) | changed
    sizes = {name: value for name, value in sizes.items() if value is not None}
    tensors = {n: t for n, t in tensors.items() if drop is None or not n.startswith(drop)}
    path = folder / "rewritten.safetensors"
    save_file(tensors, path, {"config": json.dumps(sizes)})
    return path


def test_the_tool_shows_each_run_and_answers_by_exit_code(capsys):
    assert tool.main([str(FILE)]) == 0
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("stream", "bank", "bank_k_norms", "e-0"))
    assert tool.main([str(FILE), "--tolerance", "1e-9"]) == 1
    assert "above the tolerance of 1e-09" in capsys.readouterr().err


def test_an_error_that_is_no_number_is_the_largest():
    largest = Largest()
    for error, name in ((1e-7, "a"), (float("nan"), "b"), (1e-6, "c")):
        largest.see(error, name)
    assert (largest.error, largest.name, largest.count) == (float("inf"), "b", 3)


def test_a_file_of_another_format_is_refused(tmp_path):
    refused = {
        "there is no file": tmp_path / "none.safetensors",
        "is not a safetensors file": tmp_path / "text.safetensors",
        "its metadata has no `config`": tmp_path / "bare.safetensors",
        "names that no run has, strange among them": tmp_path / "strange.safetensors",
    }
    refused["is not a safetensors file"].write_text("no tensors in here at all")
    with safe_open(FILE, "pt") as file:
        text = {"text.0": file.get_tensor("text.0")}
        save_file(text, tmp_path / "bare.safetensors")
        strange = {"strange": text["text.0"]}
        save_file(strange, tmp_path / "strange.safetensors", file.metadata())
    for message, path in refused.items():
        with pytest.raises(ValueError, match=message):
            GoldenFile.read(path)
    with pytest.raises(ValueError, match=r"has no tensor stream\.b0\.z0"):
        GoldenFile.read(rewritten(tmp_path, drop="stream."))
    with pytest.raises(ValueError, match="has no window_frames: it has"):
        replay_file(rewritten(tmp_path, window_frames=None), ParallelConfig(timeout_s=120))
