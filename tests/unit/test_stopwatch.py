"""Stages are charged once each, and the work counted is the work done."""

from __future__ import annotations

import sys
import threading
import time
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_kvpo import stopwatch
from megatron_kvpo.config import ModelConfig
from megatron_kvpo.model.flops import forward_flops, pass_flops
from megatron_kvpo.stopwatch import Span, Stopwatch, note_span, stage
from tests.unit import small

ranks = small.ranks


def test_a_stage_inside_another_is_not_charged_to_it():
    with Stopwatch() as watch:
        with stage("outer"):
            time.sleep(0.02)
            with stage("inner"):
                time.sleep(0.05)
                stopwatch.count(5, 1)
            stopwatch.count(7, 2)
        with stage("outer"):
            time.sleep(0.01)
    seconds = {name: part.seconds for name, part in watch.stages.items()}
    assert seconds["inner"] >= 0.05
    assert 0.03 <= seconds["outer"] <= watch.seconds - 0.05
    assert watch.stages["inner"].flops == 5
    assert (watch.stages["outer"].flops, watch.stages["outer"].passes) == (7, 2)
    assert watch.seconds == pytest.approx(sum(seconds.values()))


def test_nothing_is_kept_when_nobody_measures_and_two_do_not_measure_at_once():
    with stage("alone"):
        stopwatch.count(1, 1)
    assert not stopwatch.running()
    with Stopwatch() as watch:
        assert stopwatch.running()
        with pytest.raises(ValueError, match="running already"), Stopwatch():
            pass
        with pytest.raises(RuntimeError), stage("broken"):
            raise RuntimeError
    assert "alone" not in watch.stages
    assert not stopwatch.running()


def test_what_is_inside_an_opaque_stage_is_charged_to_it():
    with Stopwatch(waits=False, opaque=frozenset({"aside"})) as watch:
        with stage("aside"), stage("decode"), stage("deeper"):
            stopwatch.count(3, 1)
        with stage("decode"):
            stopwatch.count(4, 1)
        found = watch.lap()
    assert (found["aside"].flops, found["decode"].flops) == (3, 4)
    assert "deeper" not in found


def run_of(watch: Stopwatch) -> list[Span]:
    return [span for span in watch.spans if span.lane == "run"]


def test_spans_of_nested_stages_follow_each_other_and_add_up_to_the_stages():
    with Stopwatch() as watch:
        time.sleep(0.002)
        with stage("outer"):
            time.sleep(0.002)
            with stage("inner"), stage("inner"):  # one span
                time.sleep(0.002)
            time.sleep(0.002)
    spans = watch.spans
    assert [span.name for span in spans] == ["other", "outer", "inner", "outer", "other"]
    assert spans[0].start_s == 0
    assert all(a.stop_s == b.start_s for a, b in pairwise(spans))
    for name, part in watch.stages.items():
        own = [span.stop_s - span.start_s for span in spans if span.name == name]
        assert sum(own) == pytest.approx(part.seconds)


def test_what_goes_on_elsewhere_is_kept_from_the_start_to_the_end_of_measuring():
    now = time.perf_counter
    started = now()
    note_span("elsewhere", "work", started, now())  # nobody measures
    with Stopwatch() as watch:
        note_span("elsewhere", "work", started, started + 1e-9)  # it was over
        time.sleep(0.01)
        note_span("elsewhere", "early", started - 5, now())
        since = now()
        time.sleep(0.01)
        note_span("elsewhere", "work", since, now())
        note_span("elsewhere", "work", since, since)
        time.sleep(0.001)
        ended = now()
    note_span("elsewhere", "late", since, now())
    early, work = (span for span in watch.spans if span.lane == "elsewhere")
    assert (early.name, early.start_s, work.name) == ("early", 0, "work")
    assert 0.01 <= early.stop_s <= work.start_s <= early.stop_s + 0.5
    assert 0.01 <= work.stop_s - work.start_s < ended - since
    (whole,) = run_of(watch)  # those of others between do not cut it
    assert whole == Span("run", "other", 0, watch.seconds)


def test_a_lap_is_what_came_since_the_last_one_and_leaves_the_stage_that_goes_on():
    with Stopwatch() as watch, stage("outer"):
        stopwatch.count(5, 1, needed_flops=4, tokens=3)
        with stage("inner"):
            time.sleep(0.01)
        first = watch.lap()
        time.sleep(0.01)
        stopwatch.count(1, 1)
        second = watch.lap()
    outer = first["outer"]
    assert (outer.flops, outer.passes, outer.needed_flops, outer.tokens) == (5, 1, 4, 3)
    assert first["inner"].seconds >= 0.01
    assert second.keys() == {"outer"}
    assert second["outer"].flops == 1
    assert second["outer"].seconds >= 0.01


class Marks:
    """In the place of torch.cuda.Event: a GPU that is behind its host, and gets its times late."""

    now = 0.0
    waited = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Marks.now

    def synchronize(self):
        Marks.waited += 1

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


def test_a_stopwatch_that_does_not_wait_reads_a_gpus_marks_once_a_lap(monkeypatch):
    def work(seconds: float) -> None:
        Marks.now += seconds

    def fail() -> None:
        pytest.fail("it waits for the GPU")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(torch.cuda, "Event", Marks)
    with Stopwatch(waits=False) as watch:
        for _ in range(2):
            work(1)
            with stage("outer"):
                work(2)
                with stage("inner"):
                    work(4)
                work(8)
            note_span("elsewhere", "work", 0.0, time.perf_counter())
        first = watch.lap()
        assert Marks.waited == 1
        with stage("inner"):
            work(16)
        second = watch.lap()
    assert {name: part.seconds for name, part in first.items()} == {
        "other": 2, "outer": 20, "inner": 8,
    }  # fmt: skip
    assert {name: part.seconds for name, part in second.items()} == {"inner": 16}
    assert not watch.spans, "they would fill the memory of a long run"


@pytest.fixture
def _turns_at_every_step():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_turns_at_every_step")
def test_threads_may_note_spans_while_stages_come_and_go():
    count, threads = 3000, 4

    def note(lane: str) -> None:
        for _ in range(count):
            now = time.perf_counter()
            note_span(lane, "outer", now, now + 1e-3)  # not to be taken for one of the run's

    with Stopwatch() as watch:
        others = [threading.Thread(target=note, args=(f"lane {n}",)) for n in range(threads)]
        for thread in others:
            thread.start()
        while any(thread.is_alive() for thread in others):
            with stage("outer"), stage("inner"):
                pass
    for n in range(threads):
        assert sum(span.lane == f"lane {n}" for span in watch.spans) == count
    spans = run_of(watch)
    assert all(a.stop_s == b.start_s and a.name != b.name for a, b in pairwise(spans))
    assert spans[-1].stop_s == pytest.approx(watch.seconds)


def test_a_pass_of_the_released_size_costs_what_the_specification_counts():
    model = ModelConfig(preset="wan2.1_1.3b")
    parts = forward_flops(model, tokens=4680, keys=18720, lora_rank=256)
    found = {name: round(flops / 1e12, 2) for name, flops in parts.items()}
    assert found == {"linear": 11.7, "attention": 16.15, "text": 0.44, "lora": 2.83}


@torch.no_grad()
def test_the_count_is_that_of_the_operations_that_run(ranks):
    """torch counts the same pass; what it finds besides is patches, time and head."""
    tiny = small.build(ranks, "model.hidden_dim=128", "model.ffn_dim=512", "model.text_length=24")
    model = tiny.config.model
    stream = tiny.streamed(12)
    plain = sdpa_kernel(SDPBackend.MATH)  # torch counts products, not the CPU's fused attention
    watch, acting = Stopwatch(), tiny.policy.acting("current")
    with watch, FlopCounterMode(display=False) as counter, acting, plain:
        stream.velocity(tiny.latents(3, name="noisy"), 0.5)
    tokens = 3 * model.tokens_per_frame
    spent = watch.stages["other"]
    counted = pass_flops(model, tokens, 4 * tokens, lora_rank=4)
    assert (spent.flops, spent.needed_flops, spent.tokens) == (counted, counted, tokens)
    assert counted < counter.get_total_flops() < 1.4 * counted
    layers = counter.get_flop_counts()["CausalWan.blocks.0"]
    assert sum(layers.values()) * model.num_layers == counted
    stream.release()


def test_a_graph_costs_its_backward_and_what_is_computed_again():
    plain = ModelConfig(preset="wan2.1_1.3b")
    again = ModelConfig(preset="wan2.1_1.3b", recompute=True)
    forward = pass_flops(plain, 4680, 18720, 256)
    assert 2.5 * forward < pass_flops(plain, 4680, 18720, 256, graph=True) < 3.5 * forward
    more = pass_flops(again, 4680, 18720, 256, graph=True)
    assert more - pass_flops(plain, 4680, 18720, 256, graph=True) == forward
