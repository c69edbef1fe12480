"""The scoring server over real sockets: its answers, its refusals, and who is scored together."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor

import av
import httpx
import numpy as np
import pytest
import torch

from megatron_kvpo.data.video_file import VideoWriter
from megatron_kvpo.reward import wire
from megatron_kvpo.reward.base import REWARDS
from megatron_kvpo.reward.spawn import TOKEN_VARIABLE
from tests.quiet import quiet_afterwards
from tests.unit.fake_scorer import Noting, clip_of, serving, until
from tools import serve_rewards
from tools.serve_rewards import Limits, bound_socket

__all__ = ["quiet_afterwards"]

SAFE = {"Content-Type": wire.MEDIA_TYPE}
SPANS = '[{"start": 0, "stop": 6, "text": "a"}]'


def post(url: str, clips=None, **headers: str) -> httpx.Response:
    body = wire.encode(clips or [clip_of(0.5)])
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/score", content=body, headers={**SAFE, **named}, timeout=20)


def refused(response: httpx.Response, status: int, words: str) -> bool:
    assert response.status_code == status, response.text
    assert words in response.json()["detail"]
    return "Traceback" not in response.text


def video_bytes(path, frames=6) -> bytes:
    with VideoWriter(path, fps=8) as writer:
        writer.write(torch.rand(frames, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
    return path.read_bytes()


def test_scores_are_the_rewards_own_to_the_last_bit():
    clips = [clip_of(i / 7) for i in range(5)]
    rewards = Noting(), Noting(("third",))
    with serving(*rewards) as url:
        answer = post(url, clips).json()
        assert answer["components"] == ["first", "second", "third"]
        wanted = torch.cat([reward.score(clips) for reward in rewards])
        assert torch.equal(torch.tensor(answer["scores"], dtype=torch.float32), wanted)
        assert answer["scores"] == wanted.double().tolist()
        some = post(url, clips, X_Components="third,first").json()
        assert some == {"components": ["third", "first"],
                        "scores": [answer["scores"][2], answer["scores"][0]]}  # fmt: skip
        calls = len(rewards[0].calls)
        post(url, clips, X_Components="third")
        assert len(rewards[0].calls) == calls  # who is not asked does not work
        assert refused(post(url, X_Components="fourth"), 400, "ask once for some of")
        assert refused(post(url, X_Components="first,first"), 400, "ask once for some of")


def test_only_the_components_that_are_named_are_offered():
    with serving(Noting(), names=["second"]) as url:
        assert post(url, [clip_of(0.25)]).json() == {"components": ["second"], "scores": [[0.5]]}


def test_an_mp4_is_decoded_as_rgb_from_0_to_1(tmp_path):
    body = video_bytes(tmp_path / "a.mp4")
    with av.open(io.BytesIO(body)) as container:
        pixels = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    clip = serve_rewards.decode_video(body, SPANS, 2**20)
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(clip.frames_FCHW, wanted)
    said = json.dumps([{"start": 0, "stop": 6, "text": "方", "history": ["é"]}], ensure_ascii=False)
    for spans in (said, json.dumps(json.loads(said))):  # as UTF-8, or escaped
        headers = {"Content-Type": "video/mp4", "X-Clip-Spans": spans.encode()}
        with serving(Noting(("first",))) as url:
            answer = httpx.post(f"{url}/score", content=body, headers=headers).json()
        assert answer["scores"][0] == pytest.approx([float(wanted.mean())], rel=1e-6)
    sent = serve_rewards.decode_video(body, said.encode().decode("latin-1"), 2**20)
    assert (sent.spans[0].text, sent.spans[0].history) == ("方", ("é",))


def test_what_is_no_video_is_refused(tmp_path):
    body = video_bytes(tmp_path / "a.mp4")
    other = io.BytesIO()  # a video that av would read, in another container
    with av.open(other, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame(48, 32, "yuv420p")))
        container.mux(stream.encode(None))
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n"
    for data, spans, words in (
        (body, None, "X-Clip-Spans is missing"),
        (body, "[", "X-Clip-Spans is not JSON"),
        (body, "[]", r"must cover the clip's 6"),
        (body, SPANS.replace("6", "7"), r"X-Clip-Spans's span 0 is \[0, 7\)"),
        (body[:200], SPANS, "cannot be decoded as mp4"),
        (b"\x80\x04abc", SPANS, "cannot be decoded as mp4"),
        (other.getvalue(), SPANS, "cannot be decoded as mp4"),
        (playlist, SPANS, "cannot be decoded as mp4"),
    ):
        with pytest.raises(ValueError, match=words):
            serve_rewards.decode_video(data, spans, 2**20)
    with pytest.raises(ValueError, match="more than 9215 pixels"):
        serve_rewards.decode_video(body, SPANS, 6 * 32 * 48 - 1)


def test_a_token_is_needed_for_all_but_a_sign_of_life():
    with serving(Noting(), token="secret") as url:
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        for given in ("Bearer wrong", "Basic secret", "secret", "Bearer", "Bearer s\u00e9"):
            headers = {"Authorization": given.encode("latin-1")}
            answer = httpx.post(f"{url}/score", content=b"x", headers={**SAFE, **headers})
            assert refused(answer, 401, "a token is needed")
            assert httpx.get(f"{url}/health", headers=headers).status_code == 401
        assert refused(post(url), 401, "a token is needed")
        assert post(url, Authorization="Bearer secret").status_code == 200
        health = httpx.get(f"{url}/health", headers={"Authorization": "Bearer secret"}).json()
        assert health["components"] == ["first", "second"]


def test_health_says_what_is_served_and_what_waits():
    reward = Noting()
    with serving(reward) as url, ThreadPoolExecutor() as pool:
        assert post(url, [clip_of(0.5)] * 3).status_code == 200
        reward.let.clear()
        waiting = pool.submit(post, url)
        until(lambda: httpx.get(f"{url}/health").json()["waiting"] == 1)
        health = httpx.get(f"{url}/health").json()
        reward.let.set()
        assert waiting.result().status_code == 200
        assert (health["scored"], health["device"], health["status"]) == (3, "cpu", "ok")
        assert health["version"] == serve_rewards.__version__
        assert health["seconds"] >= 0
        assert httpx.get(f"{url}/health").json()["waiting"] == 0


def test_other_bodies_and_pickles_are_refused_by_name():
    pickled = b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00K\x01."
    with serving(Noting()) as url:

        def send(kind: str | None, body: bytes = pickled) -> httpx.Response:
            return httpx.post(f"{url}/score", content=body,
                              headers={"Content-Type": kind} if kind else {})  # fmt: skip

        assert refused(send("application/x-pickle"), 415, "pickles are never read")
        assert refused(send("application/octet-stream"), 415, "'application/octet-stream' is not")
        assert refused(send(None), 415, "send application/safetensors or video/mp4")
        assert refused(send(wire.MEDIA_TYPE), 400, "a pickle, which is never read")
        assert refused(send(wire.MEDIA_TYPE, b""), 400, "cut short")
        assert refused(send("Application/SafeTensors; a=b", b"{}"), 400, "cut short")
        assert httpx.get(f"{url}/docs").status_code == 404


def test_what_exceeds_a_limit_is_refused_before_and_while_it_is_read():
    limits = Limits(max_bytes=3 * 2**20, max_clips=2, max_pixels=100)
    large = bytes(6 * 2**20)
    with serving(Noting(), limits=limits) as url:
        known = httpx.post(f"{url}/score", content=large[: 4 * 2**20], headers=SAFE)
        assert refused(known, 413, "exceeds 3145728 bytes")
        pieces = (large[i : i + 2**16] for i in range(0, len(large), 2**16))  # says no length
        assert refused(httpx.post(f"{url}/score", content=pieces, headers=SAFE), 413, "exceeds")
        assert refused(post(url, [clip_of(0.5)] * 3), 400, "3 clips: send at most 2")
        assert refused(post(url, [clip_of(0.5, frames=5)]), 400, "120 pixels: send at most 100")
        assert post(url, [clip_of(0.5)] * 2).status_code == 200
    for wrong in ({"max_bytes": 0}, {"timeout_s": -1.0}):
        with pytest.raises(ValueError, match="must be above 0"):
            Limits(**wrong)


def test_who_comes_when_too_many_wait_is_asked_to_come_again():
    reward = Noting()
    with serving(reward, limits=Limits(max_waiting=1)) as url, ThreadPoolExecutor() as pool:
        reward.let.clear()
        first = pool.submit(post, url)
        assert reward.entered.wait(20)
        second = post(url)
        assert refused(second, 503, "1 requests wait already")
        assert second.headers["Retry-After"] == "1"
        reward.let.set()
        assert first.result().status_code == 200
        assert post(url).status_code == 200


def test_a_request_that_takes_too_long_is_given_up_and_the_next_is_served():
    reward = Noting()
    with serving(reward, limits=Limits(timeout_s=0.3)) as url:
        reward.let.clear()
        assert refused(post(url), 504, "not scored within 0.3 s")  # it was being scored
        assert refused(post(url), 504, "not scored within 0.3 s")  # it waited
        reward.let.set()
        assert post(url).status_code == 200
        assert len(reward.calls) == 2  # nobody waits for the second one any more


def together(reward: Noting, url: str, requests: list[list]) -> list[httpx.Response]:
    """Requests that all wait while the reward is held by another one."""
    reward.let.clear()
    with ThreadPoolExecutor(len(requests) + 1) as pool:
        before = pool.submit(post, url)
        assert reward.entered.wait(20)
        answers = []
        for clips in requests:  # one after another, so that their order is known
            answers.append(pool.submit(post, url, clips))
            count = len(answers) + 1
            until(lambda n=count: httpx.get(f"{url}/health").json()["waiting"] == n)
        reward.let.set()
        assert before.result().status_code == 200
        return [answer.result() for answer in answers]


def test_requests_that_wait_are_scored_in_one_call_up_to_max_clips():
    reward = Noting()
    requests = [[clip_of(i / 10 + j / 100) for j in range(i)] for i in range(1, 6)]
    limits = Limits(max_clips=7)
    with serving(reward, limits=limits, wait_s=0.1) as url:
        answers = together(reward, url, requests)
    assert reward.calls == [1, 1 + 2 + 3, 4, 5]
    for clips, answer in zip(requests, answers, strict=True):
        assert answer.json()["scores"] == Noting().score(clips).double().tolist()


class Slow(Noting):
    """Takes 20 ms a clip."""

    def score(self, clips):
        time.sleep(0.02 * len(clips))
        return super().score(clips)


def milliseconds(answer: httpx.Response) -> float:
    return float(re.fullmatch(r"score;dur=(\d+\.\d{3})", answer.headers["Server-Timing"])[1])


def test_an_answer_says_how_long_its_batch_was_scored(tmp_path):
    reward = Slow(("first",))
    headers = {"Content-Type": "video/mp4", "X-Clip-Spans": SPANS}
    with serving(reward, wait_s=0.1) as url:
        alone = milliseconds(post(url, [clip_of(0.5)] * 2))
        body = video_bytes(tmp_path / "a.mp4")
        video = milliseconds(httpx.post(f"{url}/score", content=body, headers=headers))
        scored = httpx.get(f"{url}/health").json()["seconds"]
        reward.entered.clear()
        answers = together(reward, url, [[clip_of(0.5)], [clip_of(0.25)] * 3])
    assert alone >= 40
    assert video >= 20
    assert alone + video == pytest.approx(1000 * scored, abs=1)  # and not what they waited for
    assert reward.calls == [2, 1, 1, 4]
    first, second = map(milliseconds, answers)
    assert first == second >= 80


def test_one_bad_clip_fails_its_own_request_only(caplog):
    reward = Noting()
    texts = ["a", "unreadable", "b", "secret", "nan", "stop", "c"]
    with serving(reward, wait_s=0.1) as url:
        answers = together(reward, url, [[clip_of(0.5), clip_of(0.25, text)] for text in texts])
        for i in (0, 2, 6):
            assert answers[i].json()["scores"] == [[0.5, 0.25], [1.0, 0.5]]
        assert refused(answers[1], 400, "clip 1: unreadable text")
        assert refused(answers[3], 500, "failed with KeyError")
        assert "secret" not in answers[3].text
        assert refused(answers[4], 500, "first is nan for clip 1 of 2: 2 of 4 scores are not")
        assert refused(answers[5], 500, "failed with RuntimeError")
        assert post(url).status_code == 200
    assert reward.calls == [1, 14, 2, 2, 2, 2, 2, 2, 2, 1]
    (logged,) = [r for r in caplog.records if r.exc_info and r.exc_info[0] is KeyError]
    assert logged.levelno == logging.ERROR


def test_an_address_that_others_reach_needs_a_token():
    for host in ("0.0.0.0", "10.1.2.3", "::", "example.invalid"):
        with pytest.raises(ValueError, match=f"open to other machines: set {TOKEN_VARIABLE}"):
            bound_socket(host, 0, None)
    for host in ("127.0.0.1", "localhost"):
        bound_socket(host, 0, None).close()
    bound_socket("0.0.0.0", 0, "secret").close()
    with bound_socket("127.0.0.1", 0, None) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} cannot be had"):
            bound_socket("127.0.0.1", port, None)


def test_the_command_line_builds_the_recipes_rewards_or_those_named(tmp_path, monkeypatch):
    built, served = [], []

    class Silent(serve_rewards.Server):
        def run(self, sockets):
            self.started = True
            served.append(self._said)

    def build(config, device):
        built.append((dict(config.weights), device.type))
        return Noting()

    monkeypatch.setattr(serve_rewards, "Server", Silent)
    monkeypatch.setattr(serve_rewards.signal, "signal", lambda *_: None)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    for name in ("first", "second"):
        monkeypatch.setitem(REWARDS, name, build)
    recipe, port = tmp_path / "recipe.yaml", tmp_path / "port"
    recipe.write_text("reward: {weights: {second: 1.0}, held_out: [first]}\n")
    common = [str(recipe), "--port", "0", "--device", "cpu"]
    assert serve_rewards.main([*common, "--port-file", str(port)]) == 0
    assert built == [({"second": 1.0}, "cpu")]
    assert served[0]["components"] == ["second", "first"]
    assert served[0]["url"] == f"http://127.0.0.1:{int(port.read_text())}"
    serve_rewards.main([*common, "reward.weights.second=2.0", "--components", "first,"])
    assert served[1]["components"] == ["first"]
    assert built[1][0] == {"second": 2.0}
    recipe.write_text("{}")
    for arguments, words in (
        (common, "names no rewards"),
        ([*common, "--components", "frist"], "did you mean 'first'"),
        ([*common, "--max-clips", "0"], "--max-clips 0 must be above 0"),
        ([*common, "--host", "0.0.0.0"], TOKEN_VARIABLE),
        (["nowhere.yaml", "--port", "0"], "no recipe at nowhere.yaml"),
    ):
        with pytest.raises(ValueError, match=words):
            serve_rewards.main(arguments)
