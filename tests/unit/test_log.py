"""The logger's promises: stdout for results only, one rank speaks, lines fit a terminal."""

import os

import pytest
import torch

from megatron_kvpo import log
from tests import quiet

_quiet_afterwards = quiet.quiet_afterwards


def test_first_rank_logs_to_stderr_and_file_and_leaves_stdout_alone(tmp_path, capsys):
    log.setup(True, tmp_path / "run")
    log.get_logger("megatron_kvpo.train").info("base weights %s", "loaded")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.rstrip().endswith("base weights loaded")
    assert "base weights loaded" in (tmp_path / "run" / "run.log").read_text()


def test_other_ranks_only_warn_and_say_who_they_are(tmp_path, capsys):
    log.setup(False, tmp_path, rank=3)
    logger = log.get_logger("__main__")
    logger.info("not heard")
    logger.warning("a video is corrupt")
    err = capsys.readouterr().err
    assert "not heard" not in err
    assert "rank 3: warning: a video is corrupt" in err
    assert not (tmp_path / "run.log").exists()


def test_setup_twice_says_things_once(tmp_path, capsys):
    log.setup(True, tmp_path)
    log.setup(True, tmp_path)
    log.get_logger("x").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "run.log").read_text().count("once") == 1


def test_progress_lines_fit_80_columns_and_tell_time_left(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    log.setup(True, tmp_path)
    with log.Progress(1200, start=1000) as progress:
        for done in range(1001, 1004):
            now[0] += 12.5
            progress.update(done, reward=-0.123456, gain=0.25, loss=-1.5e-5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(len(line) < 80 for line in lines)
    assert lines[-1] == (
        "update 1003/1200 reward -0.12 gain +0.25 loss -1.5e-05 12.5 s/update left 41:02"
    )  # 197 updates at 12.5 s are 2462 s; with three digits it were 80 columns
    assert progress.seconds_per_update == 12.5
    assert (tmp_path / "run.log").read_text().count("update 10") == 3


LARGE = {"reward": -123456.789, "loss": -9.87654e-10, "grad": 1.23456e10}


def test_a_line_that_is_too_long_loses_whole_words_and_keeps_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    log.setup(True)
    with log.Progress(1_234_567, start=1_234_000) as progress:
        for values in (LARGE, {**LARGE, "more": 1.0}, {}):
            now[0] += 98765.4
            progress.update(1_234_001, **values)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == (
        "update 1234001/1234567 reward -1.23e+05 loss -9.88e-10 left 15528:06:56"
    )  # 566 updates of 98765.4 s
    assert second.startswith("update 1234001/1234567 reward -1.23e+05 loss -9.88e-10 left")
    assert third.startswith("update 1234001/1234567 2.96e+05 s/update left")
    assert all(len(line) < 80 for line in (first, second, third))


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("values", [{}, {"reward": 0.5}, LARGE, {**LARGE, "eval{": -1e300}])
@pytest.mark.parametrize(("label", "total"), [("update", 4), ("step", 123_456_789)])
def test_lines_and_bars_of_any_numbers_fit_the_terminal_and_80_columns(
    tmp_path, capsys, monkeypatch, columns, values, label, total
):
    monkeypatch.setattr(log.shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    log.setup(True, tmp_path)
    for terminal in (False, True):
        monkeypatch.setattr(log.sys.stderr, "isatty", lambda: terminal, raising=False)  # noqa: B023
        with log.Progress(total, start=total - 2, label=label) as progress:
            progress.update(total - 1, **values)
        shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
        most = min(columns, 80) if terminal else 80
        assert all(len(line) < most for line in shown)
        assert any("left" in line for line in shown) or columns == 40
        assert any(f"{total - 1}/{total}" in line for line in shown)
    for line in (tmp_path / "run.log").read_text().splitlines():
        assert len(line) < 80 + len("2026-01-01 00:00:00 ")


def test_progress_on_a_terminal_is_a_bar_and_the_lines_go_to_the_file(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True, raising=False)
    log.setup(True, tmp_path)
    with log.Progress(4) as progress:
        progress.update(1, reward=0.5)
        log.get_logger("x").info("a word in between")
        progress.update(2, reward=0.6)
    out, err = capsys.readouterr()
    assert out == ""
    assert "update 2/4 |" in err
    assert "\r" in err
    assert "a word in between" in err
    text = (tmp_path / "run.log").read_text()
    assert "update 1/4 reward +0.5" in text
    assert "update 2/4 reward +0.6" in text


def test_progress_is_silent_on_other_ranks_but_still_measures(capsys):
    log.setup(False, rank=1)
    with log.Progress(4, first=False) as progress:
        progress.update(2, reward=1.0)
    assert capsys.readouterr().err == ""
    assert progress.seconds_per_update >= 0


def test_progress_refuses_a_start_beyond_the_end():
    with pytest.raises(ValueError, match="starts at 5 of 4"):
        log.Progress(4, start=5)


def test_result_is_one_line_on_stdout(capsys):
    log.emit_result('{"gain_sd": 0.3}')
    assert capsys.readouterr().out == '{"gain_sd": 0.3}\n'
    with pytest.raises(ValueError, match="one line, this one has 2"):
        log.emit_result("a\nb")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (float("nan"), "?"), (float("inf"), "?")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert log.format_duration(seconds) == text


def test_bad_input_of_a_run_is_one_line(capsys):
    def refuse(recipe, changes):
        raise ValueError(f"{recipe}: 3 ranks, {changes}")

    log.setup(True)  # no run is on
    with pytest.raises(SystemExit) as ended:
        log.run_training(refuse, ["a.yaml", "seed=1"])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("error: a.yaml: 3 ranks, ['seed=1']\n")
    with pytest.raises(SystemExit):
        log.run_training(refuse, [])
    assert "name a recipe" in capsys.readouterr().err


def test_a_full_gpu_ends_a_run_with_what_needs_less_memory(tmp_path):
    def fail(recipe, changes):
        log.setup(True, tmp_path)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.07 GiB")

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        log.run_training(fail, ["a.yaml"], smaller="policy.max_rows")
    written = (tmp_path / "run.log").read_text()
    assert "full. What needs less of it: policy.max_rows" in written


class Fault(RuntimeError):
    """Like CUDA's, of which this one's kinds are."""


@pytest.mark.parametrize("error", [ValueError("3 rows"), RuntimeError("the ranks are there")])
def test_bad_input_of_a_command_is_one_line(error, capsys):
    def fail():
        raise error

    log.setup(True)
    with pytest.raises(SystemExit) as ended:
        log.run_command(fail, log.get_logger("tool"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {error}\n")


def test_a_fault_of_a_command_keeps_its_traceback(capsys):
    def fail():
        raise Fault("out of memory")

    with pytest.raises(Fault, match="out of memory"):
        log.run_command(fail, log.get_logger("tool"))
    assert "out of memory" not in capsys.readouterr().err  # Python shows it there


def test_what_ends_a_run_later_is_in_its_log_with_the_traceback(tmp_path, capsys):
    def fail(recipe, changes):
        log.setup(True, tmp_path)
        raise ValueError("loss is nan")

    with pytest.raises(ValueError, match="loss is nan"):
        log.run_training(fail, ["a.yaml"])
    written = (tmp_path / "run.log").read_text()
    assert "critical: the run ends" in written
    assert "in fail" in written
    assert "ValueError: loss is nan" in written
    assert "the run ends" not in capsys.readouterr().err  # Python shows it there
