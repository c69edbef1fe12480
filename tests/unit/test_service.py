"""The side that asks for scores: whom, how often, for how long, and what it makes of an answer."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from megatron_kvpo.reward import service
from megatron_kvpo.reward.service import RemoteReward, connect
from megatron_kvpo.reward.spawn import TOKEN_VARIABLE
from megatron_kvpo.reward_config import ServiceConfig
from megatron_kvpo.stopwatch import Span, Stopwatch
from tests.quiet import quiet_afterwards
from tests.unit.fake_scorer import Noting, clip_of, free_port, serving, until
from tools.serve_rewards import Limits

__all__ = ["quiet_afterwards"]

CLIPS = [clip_of(i / 9) for i in range(8)]
SCORES = Noting().score(CLIPS)
NAMES = ["first", "second"]


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(service, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(service, "_LAST_WAIT_S", 0.2)


def config(*urls: str, **more) -> ServiceConfig:
    return ServiceConfig(urls=urls, **{"timeout_s": 20.0, "patience_s": 20.0, **more})


def one(url: str, names=("first", "second"), **more) -> RemoteReward:
    (reward,) = connect(config(url, **more), names)
    return reward


HEALTH = {"status": "ok", "components": NAMES, "max_bytes": 2**20, "max_clips": 64}


@contextmanager
def scripted(*answers, health=HEALTH) -> Iterator[tuple[str, list[float]]]:
    """A server that answers /score as the script says, the last line for ever; and when it did."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.say(200, health)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            times.append(time.monotonic())
            answer = answers[min(len(times), len(answers)) - 1]
            if answer is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self.say(*answer)

        def say(self, status, said, timing=None):
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            if timing is not None:
                self.send_header("Server-Timing", timing)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", times
        finally:
            server.shutdown()
            thread.join()


def good(clips: int = 1) -> tuple[int, dict]:
    return 200, {"components": NAMES, "scores": [[0.5] * clips, [1.0] * clips]}


def test_scores_come_in_order_whatever_the_order_of_the_answers():
    reward = Noting()
    with serving(reward) as url:
        remote = one(url)
        assert remote.components == ("first", "second")
        waiting = [remote.submit(CLIPS[i:]) for i in range(8)]
        for i in reversed(range(8)):
            scores = waiting[i]()
            assert torch.equal(scores, SCORES[:, i:])
            assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
        assert torch.equal(remote.score(CLIPS), SCORES)
        assert remote.submit([])().shape == (2, 0)
        remote.close()
        with pytest.raises(RuntimeError, match="is closed"):
            remote.submit(CLIPS)


def test_what_is_done_to_frames_after_they_were_sent_does_not_matter():
    reward = Noting()
    with serving(reward) as url:
        remote = one(url)
        reward.let.clear()
        clip = clip_of(0.5)
        waiting = remote.submit([clip])
        clip.frames_FCHW.zero_()
        reward.let.set()
        assert waiting().tolist() == [[0.5], [1.0]]
        remote.close()


def test_many_clips_go_as_several_requests_and_frames_may_be_rounded():
    with serving(Noting(), limits=Limits(max_clips=3)) as url:
        remote = one(url)
        assert torch.equal(remote.submit(CLIPS)(), SCORES)
        remote.close()
    with serving(Noting(), limits=Limits(max_bytes=2 * 2**16 + 600)) as url:
        remote = one(url)
        assert torch.equal(remote.submit(CLIPS)(), SCORES)
        assert len(list(remote._parts(CLIPS))) == 8
        with pytest.raises(ValueError, match=r"takes 172800 bytes .* --max-bytes 345600"):
            remote.submit([clip_of(0.5, frames=600)])
        remote.close()
        rounded = one(url, frames="uint8")
        assert len(list(rounded._parts(CLIPS))) == 4
        assert torch.equal(rounded.submit([clip_of(0.3)])(), Noting().score([clip_of(76 / 255)]))
        rounded.close()


def test_each_component_goes_to_the_first_server_that_has_it(caplog):
    a, b, c = Noting(("first", "third")), Noting(("second", "first")), Noting(("third",))
    with serving(a) as url_a, serving(b) as url_b, serving(c) as url_c:
        remotes = connect(config(url_a, url_b, url_c), ["second", "first", "third"])
        assert [remote.components for remote in remotes] == [("first", "third"), ("second",)]
        assert f"{url_c} is not needed" in caplog.text
        assert remotes[1].submit([clip_of(0.5)])().tolist() == [[0.5]]
        assert remotes[0].submit([clip_of(0.5)])().tolist() == [[0.5], [1.0]]
        for remote in remotes:
            remote.close()
        with pytest.raises(ValueError, match=r"no scorer has \['fourth'\]: there are .*'third'"):
            connect(config(url_a, url_b), ["first", "fourth"])


def test_some_components_may_be_asked_for_in_any_order():
    with serving(Noting()) as url:
        scorer = one(url)
        assert torch.equal(scorer.submit(CLIPS, ["second"])(), SCORES[1:])
        assert torch.equal(scorer.submit(CLIPS, ["second", "first"])(), SCORES.flip(0))
        assert scorer.submit([], ["second"])().shape == (1, 0)
        scorer.close()


def test_a_wrong_token_or_none_ends_it_at_once(monkeypatch):
    with serving(Noting(), token="right") as url:
        with pytest.raises(ValueError, match=f"wants a token: set {TOKEN_VARIABLE}"):
            one(url)
        monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
        with pytest.raises(ValueError, match="refuses: HTTP 401: a token is needed"):
            one(url)
        monkeypatch.setenv(TOKEN_VARIABLE, "right")
        remote = one(url)
        assert torch.equal(remote.submit(CLIPS)(), SCORES)
        remote.close()


def test_two_clients_at_once_each_get_their_own():
    with serving(Noting(), wait_s=0.05) as url:
        remotes = [one(url), one(url)]
        waiting = [remotes[i % 2].submit(CLIPS[i : i + 2]) for i in range(6)]
        for i, result in enumerate(waiting):
            assert torch.equal(result(), SCORES[:, i : i + 2])
        for remote in remotes:
            remote.close()


def timed(timing: str | None) -> tuple[list[Span], str]:
    """Spans besides the run's own of one request, 50 ms after measuring began; the server's url."""
    with scripted((*good(), timing)) as (url, _):
        remote = one(url)
        with Stopwatch() as watch:
            time.sleep(0.05)
            assert remote.submit([clip_of(0.5)])().tolist() == [[0.5], [1.0]]
        remote.close()
    spans = [span for span in watch.spans if span.lane != "run"]
    assert all(0.05 < span.stop_s < watch.seconds for span in spans)
    return spans, url


@pytest.mark.parametrize("timing", [
    "score;dur=40", "score; dur=40.0", "db;dur=3, score;dur=40;desc=x", "score;dur=40,total;dur=9",
])  # fmt: skip
def test_when_a_server_scored_is_noted_if_it_says_how_long(timing):
    (span,), url = timed(timing)
    assert (span.lane, span.name) == (f"scorer {url}", "score")
    assert span.stop_s - span.start_s == pytest.approx(0.04)


@pytest.mark.parametrize("timing", [
    None, "", "nonsense", "score", "score;dur", "score;dur=", "score;dur=ten", "score;dur=-5",
    "score;dur=nan", "score;dur=1e9", "score;dur=5ms", "score;dur=" + 400 * "9", "other;dur=5",
    "underscore;dur=5", "score;desc=dur", "\xb2;score=5",
])  # fmt: skip
def test_a_server_that_says_no_time_or_nonsense_is_as_good(timing):
    assert timed(timing)[0] == []


BROKEN = {
    "lost connection": (None, "does not answer"),
    "502": ((502, b"bad gateway"), "HTTP 502: bad gateway"),
    "503": ((504, {"detail": "slow"}), "HTTP 504: slow"),
    "no json": ((200, b"<html>"), "its answer is not JSON"),
    "no table": ((200, []), "its answer is no table"),
    "other components": ((200, {"components": ["x"], "scores": [[1.0]]}), "asked for"),
    "too few": (good(0), "not 2 x 1 numbers"),
    "too many": (good(2), "not 2 x 1 numbers"),
    "nan": ((200, {"components": NAMES, "scores": [[float("nan")], [1.0]]}), "numbers"),
    "above float32": ((200, {"components": NAMES, "scores": [[1e39], [1.0]]}), "numbers"),
    "texts": ((200, {"components": NAMES, "scores": [["1"], [1.0]]}), "numbers"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_answer_that_is_none_is_asked_for_again(what, caplog):
    answer, words = BROKEN[what]
    caplog.set_level(logging.INFO)
    with scripted(answer, answer, good()) as (url, times):
        remote = one(url)
        assert remote.submit([clip_of(0.5)])().tolist() == [[0.5], [1.0]]
        remote.close()
    assert len(times) == 3
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert url in warnings[0]
    assert words in warnings[0]
    assert "the run waits" in warnings[0]
    assert caplog.records[-1].getMessage().startswith(f"scorer {url} answers again, after")


@pytest.mark.parametrize("status", [400, 401, 413, 415])
def test_a_refusal_is_raised_at_once_with_the_servers_words(status):
    with scripted((status, {"detail": "because of this"})) as (url, times):
        remote = one(url)
        with pytest.raises(ValueError, match=f"{url} refuses: HTTP {status}: because of this"):
            remote.submit([clip_of(0.5)])()
        assert len(times) == 1
        remote.close()


def test_a_scorer_that_fails_ends_the_run_with_its_words():
    with serving(Noting()) as url:
        remote = one(url)
        with pytest.raises(RuntimeError, match=r"fails: HTTP 500: first is nan for clip 1 of 2"):
            remote.submit([clip_of(0.5), clip_of(0.5, "nan")])()
        with pytest.raises(ValueError, match=r"HTTP 400: clip 0: unreadable text"):
            remote.submit([clip_of(0.5, "unreadable")])()
        with pytest.raises(ValueError, match=r"clip.0 has values from 2 to 2"):
            remote.submit([clip_of(2.0)])
        remote.close()


def with_clock(url: str, **more) -> tuple[RemoteReward, list[float]]:
    """A client whose waits take no time, and what it waited."""
    line = service._Line(url, 5.0)
    waits: list[float] = []
    clock = [100.0]

    def wait(seconds: float) -> bool:
        waits.append(round(seconds, 6))
        clock[0] += seconds
        return False

    made = RemoteReward(line, NAMES, line.health(), config(url, **more),
                        now=lambda: clock[0], wait=wait)  # fmt: skip
    return made, waits


def test_waits_double_up_to_a_bound_and_patience_ends(monkeypatch, caplog):
    monkeypatch.setattr(service, "_FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(service, "_LAST_WAIT_S", 30.0)
    with scripted((502, b"down")) as (url, times):
        remote, waits = with_clock(url, patience_s=200.0)
        words = rf"{url} has not answered for 3:20 \(HTTP 502: down\)"
        with pytest.raises(RuntimeError, match=words):
            remote.submit([clip_of(0.5)])()
        remote.close()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 18.5]
    assert len(times) == len(waits) + 1
    warned = [r for r in caplog.records if "asking again every 0.5 to 30 s for" in r.getMessage()]
    assert len(warned) == 1 + 3  # at once, then one each minute or so


def test_a_busy_scorer_is_asked_when_it_says_and_complained_of_after_a_minute(monkeypatch, caplog):
    monkeypatch.setattr(service, "_LAST_WAIT_S", 30.0)
    busy = (503, {"detail": "16 requests wait"})
    with scripted(busy, busy, good()) as (url, _):
        remote, waits = with_clock(url)
        remote.submit([clip_of(0.5)])()
        assert not caplog.records
        remote.close()
    with serving(Noting()) as url:
        remote, waits = with_clock(url, patience_s=300.0)
        answers = [service._UnansweredError("busy", 7.0, True)] * 12
        real = remote._line.score
        remote._line.score = lambda *a: (
            (_ for _ in ()).throw(answers.pop()) if answers else real(*a)
        )
        remote.submit([clip_of(0.5)])()
        assert min(waits) == 7.0
        assert "(busy)" in caplog.text
        remote.close()


def test_a_server_that_lost_a_component_is_waited_for(caplog):
    health = dict(HEALTH)
    with scripted((502, b""), good(), health=health) as (url, times):
        remote = one(url)
        health["components"] = ["first"]
        waiting = remote.submit([clip_of(0.5)])
        time.sleep(0.3)
        assert len(times) == 1  # its health is looked at before clips are sent once more
        health["components"] = NAMES
        assert waiting().tolist() == [[0.5], [1.0]]
        remote.close()


def test_closing_ends_a_wait_and_a_missing_server_is_named():
    with free_port() as port:
        url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"{url} has not answered within 0.3 s .*refused"):
            connect(config(url), NAMES, start_limit_s=0.3)
        assert time.monotonic() - started < 5
    with scripted(None) as (url, times):
        remote = one(url)
        waiting = remote.submit([clip_of(0.5)])
        until(lambda: times)
        remote.close()
        with pytest.raises(RuntimeError, match="was closed"):
            waiting()
    with pytest.raises(ValueError, match="names no server"):
        connect(ServiceConfig(), NAMES)
    with pytest.raises(ValueError, match="needs its recipe"):
        connect(ServiceConfig(spawn=True), NAMES)


def test_each_outage_is_told_of(caplog):
    caplog.set_level(logging.INFO)
    with scripted((502, b""), good(), (502, b""), good()) as (url, _):
        remote = one(url)
        for _ in range(3):
            remote.submit([clip_of(0.5)])()
        remote.close()
    told = [r.levelname for r in caplog.records if r.name == service.logger.name]
    assert told == ["WARNING", "INFO"] * 2
