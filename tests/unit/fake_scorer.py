"""A scoring server in a thread of the test, with a reward that notes what it is asked."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_kvpo.records import Clip, Span
from tools.reward_worker import Worker
from tools.serve_rewards import Limits, Server, Service, bound_socket


def clip_of(value: float, text: str = "a", frames: int = 2) -> Clip:
    spans = (Span(start=0, stop=frames, text=text),)
    return Clip(frames_FCHW=torch.full((frames, 3, 4, 6), value), spans=spans)


@dataclass
class Noting:
    """Scores a clip by its mean times 1, 2, ...; its text can make it fail."""

    components: tuple[str, ...] = ("first", "second")
    calls: list[int] = field(default_factory=list)
    entered: threading.Event = field(default_factory=threading.Event)
    let: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.let.set()

    def score(self, clips: Sequence[Clip]) -> Tensor:
        self.calls.append(len(clips))
        self.entered.set()
        assert self.let.wait(20)
        mean = torch.stack([clip.frames_FCHW.mean() for clip in clips])
        for i, clip in enumerate(clips):
            text = clip.spans[0].text
            if text == "unreadable":
                raise ValueError(f"clip {i}: unreadable text")
            if text == "secret":
                raise KeyError("secret")
            if text == "stop":
                raise StopIteration
            if text == "nan":
                mean[i] = float("nan")
        return mean * torch.arange(1, len(self.components) + 1)[:, None]


@contextmanager
def serving(
    *rewards: Noting, token: str | None = None, limits: Limits | None = None, port: int = 0,
    wait_s: float = 0.0, names: Sequence[str] = (),
) -> Iterator[str]:  # fmt: skip
    """The server's address, as long as the context lasts."""
    limits = limits or Limits()
    offered = names or [name for reward in rewards for name in reward.components]
    worker = Worker(rewards, offered, limits.max_clips, wait_s)
    with bound_socket("127.0.0.1", port, token) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        said = {"url": url, "components": offered, "device": "cpu"}
        server = Server(Service(worker, limits, token, "cpu").app(), said)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        until(lambda: server.started)
        try:
            yield url
        finally:
            for reward in rewards:
                reward.let.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(true, limit_s: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.01)


@contextmanager
def free_port() -> Iterator[int]:
    """A loopback port that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
