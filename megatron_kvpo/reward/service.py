"""Scoring in another process or on another machine: the side that asks.

The other side is tools/serve_rewards.py. A scorer that does not answer is asked again, after longer
and longer waits, and the run goes on when it does; one that refuses ends the run with its words.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.config import RewardConfig, RunConfig
from megatron_kvpo.records import Clip
from megatron_kvpo.reward import wire
from megatron_kvpo.reward.composite import Answer
from megatron_kvpo.reward.spawn import TOKEN_VARIABLE, SpawnedServer
from megatron_kvpo.reward_config import ServiceConfig
from megatron_kvpo.stopwatch import note_span

logger = log.get_logger(__name__)

_FIRST_WAIT_S, _LAST_WAIT_S = 0.5, 30.0
_SAY_EVERY_S = 60.0
_CONNECT_S = 10.0
_IDLE_S = 30.0  # shorter than the server keeps a connection
_THREADS, _PIECE = 4, 2**20
_MAX_BODY = 2**29  # more clips than this go as several requests, at the same time
_TEXTS = 2**16  # bytes that a clip's texts may take, for the count
_UNANSWERED = {408, 429, 502, 503, 504}
_TIMING = re.compile(r"(?:^|,)\s*score\s*;\s*dur=([0-9]{1,9}(?:\.[0-9]+)?)\s*(?:[;,]|$)")


class _UnansweredError(Exception):
    """No answer, this time."""

    def __init__(self, reason: str, wait_s: float = 0.0, busy: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.busy = wait_s, busy


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """What a server's health says."""

    components: tuple[str, ...]
    max_bytes: int
    max_clips: int


class _Line:
    """One server, asked once a call. ValueError: it refuses. RuntimeError: it fails."""

    def __init__(self, server: str | SpawnedServer, timeout_s: float) -> None:
        self.child = None if isinstance(server, str) else server
        self._url = server.rstrip("/") if isinstance(server, str) else None
        token = self.child.token if self.child else os.environ.get(TOKEN_VARIABLE)
        self._http = httpx.Client(
            timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s)),
            limits=httpx.Limits(max_connections=2 * _THREADS, keepalive_expiry=_IDLE_S),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=False,  # no proxy between a run and its scorer
        )

    @property
    def name(self) -> str:
        """Its address, for messages."""
        return self._address() or "of this process"

    def _address(self) -> str | None:
        return self._url if self.child is None else self.child.url

    def health(self) -> _Offer:
        """What it offers."""
        said = self._json(self._ask("GET", "/health"))
        names, limits = said.get("components"), [said.get("max_bytes"), said.get("max_clips")]
        if said == {"status": "ok"}:
            raise ValueError(f"scorer {self.name} wants a token: set {TOKEN_VARIABLE} to its own")
        if (not isinstance(names, list) or not all(isinstance(name, str) for name in names)
                or not all(type(limit) is int and limit > 0 for limit in limits)):  # fmt: skip
            raise _UnansweredError(f"its health is {str(said)[:200]}")
        return _Offer(components=tuple(names), max_bytes=said["max_bytes"],
                      max_clips=said["max_clips"])  # fmt: skip

    def score(self, body: bytes, components: Sequence[str], num_clips: int) -> Tensor:
        """Float32 [K, B] of a body's clips."""
        pieces = (body[i : i + _PIECE] for i in range(0, len(body), _PIECE))
        headers = {"Content-Type": wire.MEDIA_TYPE, "Content-Length": str(len(body)),
                   "X-Components": ",".join(components)}  # fmt: skip
        response = self._ask("POST", "/score", content=pieces, headers=headers)
        arrived = time.perf_counter()
        if took := _TIMING.search(response.headers.get("Server-Timing", "")):
            note_span(f"scorer {self.name}", "score", arrived - float(took[1]) / 1000, arrived)
        said = self._json(response)
        if said.get("components") != list(components):
            raise _UnansweredError(f"it scored {str(said.get('components'))[:200]}, asked for "
                                   f"{list(components)}")  # fmt: skip
        rows = said.get("scores")
        if (not isinstance(rows, list) or len(rows) != len(components)
                or not all(_is_row(row, num_clips) for row in rows)):  # fmt: skip
            raise _UnansweredError(f"its scores are not {len(components)} x {num_clips} numbers")
        return torch.tensor(rows, dtype=torch.float32)

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        url = self._address()
        if url is None:
            raise _UnansweredError("it is starting")
        try:
            response = self._http.request(method, url + path, **more)
        except httpx.InvalidURL as error:
            raise ValueError(f"reward.service.urls {url!r} is no address: {error}") from None
        except httpx.HTTPError as error:
            raise _UnansweredError(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        status = response.status_code
        if status == 200:
            return response
        words = f"HTTP {status}: {_words(response)}"
        if status in _UNANSWERED:
            after = response.headers.get("Retry-After", "")
            raise _UnansweredError(words, float(after) if after.isdigit() else 0.0, status == 503)
        if 400 <= status < 500:
            raise ValueError(f"scorer {url} refuses: {words}")
        raise RuntimeError(f"scorer {url} fails: {words}")

    @staticmethod
    def _json(response: httpx.Response) -> dict[str, Any]:
        try:
            said = wire.parse_json(response.content, "its answer")
        except ValueError as error:
            raise _UnansweredError(str(error)) from None
        if not isinstance(said, dict):
            raise _UnansweredError("its answer is no table")
        return said

    def close(self) -> None:
        """Give the connections back, and end the server if it is this process's own."""
        self._http.close()
        if self.child is not None:
            self.child.close()


def _is_row(row: Any, num_clips: int) -> bool:
    return isinstance(row, list) and len(row) == num_clips and all(
        type(value) in (int, float) and abs(value) < 3.4e38 for value in row  # a nan is not below
    )  # fmt: skip


def _words(response: httpx.Response) -> str:
    """What an error's body says."""
    with suppress(ValueError):
        said = response.json()
        if isinstance(said, dict) and said.get("detail") is not None:
            return str(said["detail"])[:1000]
    return response.text[:1000]


class _Outage:
    """Says that a scorer does not answer: at once, then every minute, and when it is over."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._began: float | None = None
        self._said, self._at, self._told = 0.0, "", False

    def note(self, name: str, fault: _UnansweredError, patience_s: float) -> None:
        """One more failure. A server that is only busy is worth a line after a minute."""
        with self._lock:
            now = self._now()
            if self._began is None:
                self._began, self._said, self._at = now, now, time.strftime("%H:%M:%S")
                self._told = False
                due = not fault.busy
            else:
                due = now - self._said >= _SAY_EVERY_S or not (self._told or fault.busy)
            if due:
                self._said, self._told = now, True
                logger.warning(
                    "scorer %s does not answer (%s): the run waits, asking again every %g to %g s "
                    "for at most %s; started at %s", name, fault, _FIRST_WAIT_S, _LAST_WAIT_S,
                    log.format_duration(patience_s), self._at,
                )  # fmt: skip

    def over(self, name: str) -> None:
        """It answered."""
        with self._lock:
            if self._began is not None and self._told:
                took = log.format_duration(self._now() - self._began)
                logger.info("scorer %s answers again, after %s", name, took)
            self._began = None  # the next one is told of again


class RemoteReward:
    """Components that one server scores."""

    def __init__(
        self, line: _Line, components: Sequence[str], offer: _Offer, config: ServiceConfig, *,
        now: Callable[[], float] = time.monotonic, wait: Callable[[float], bool] | None = None,
    ) -> None:  # fmt: skip
        """See `connect`. `wait` sleeps so many seconds, and returns True if it was closed."""
        self.components = tuple(components)
        self._line, self._offer, self._config = line, offer, config
        self._closed = threading.Event()
        self._now, self._wait = now, wait or self._closed.wait
        self._outage, self._turns = _Outage(now), threading.BoundedSemaphore(_THREADS)

    def submit(self, clips: Sequence[Clip], names: Sequence[str] | None = None) -> Answer:
        """Send clips, which may change afterwards; the result waits for float32 [K, B], on the CPU.

        `names`: the components to score; None is all.

        The result raises:
            ValueError: the server refuses these clips or this client, with its words.
            RuntimeError: it fails, or has not answered for patience_s.
        """
        if self._closed.is_set():
            raise RuntimeError(f"the scorer {self._line.name} is closed: connect again")
        wanted = self.components if names is None else tuple(names)
        answers = [
            self._started(wire.encode(part, self._config.frames), wanted, len(part))
            for part in self._parts(clips)
        ]
        empty = torch.zeros(len(wanted), 0)
        return lambda: torch.cat([empty, *(answer.result() for answer in answers)], dim=1)

    def score(self, clips: Sequence[Clip]) -> Tensor:
        """See Reward.score."""
        device = clips[0].frames_FCHW.device if clips else "cpu"
        return self.submit(clips)().to(device)

    def close(self) -> None:
        """Stop asking; a server that this process started ends."""
        self._closed.set()
        self._line.close()

    def _parts(self, clips: Sequence[Clip]) -> Iterator[list[Clip]]:
        """Clips in order, as many together as one request takes."""
        width = 4 if self._config.frames == "float32" else 1
        most = min(self._offer.max_bytes, _MAX_BODY)
        part: list[Clip] = []
        size = 0
        for clip in clips:
            own = clip.frames_FCHW.numel() * width
            if own > self._offer.max_bytes:
                raise ValueError(f"a clip takes {own} bytes and scorer {self._line.name} reads "
                                 f"{self._offer.max_bytes}: start it with --max-bytes {2 * own}, "
                                 "or set reward.service.frames to uint8")  # fmt: skip
            if part and (len(part) == self._offer.max_clips or size + own + _TEXTS > most):
                yield part
                part, size = [], 0
            part.append(clip)
            size += own + _TEXTS
        if part:
            yield part

    def _started(self, body: bytes, names: Sequence[str], num_clips: int) -> Future[Tensor]:
        answer: Future[Tensor] = Future()
        # A daemon: a run that ends for another reason does not wait for a scorer.
        threading.Thread(target=self._settle, args=(answer, body, names, num_clips), daemon=True,
                         name="scorer").start()  # fmt: skip
        return answer

    def _settle(self, answer: Future[Tensor], *request: Any) -> None:
        try:
            with self._turns:
                answer.set_result(self._asked_until_answered(*request))
        except (ValueError, RuntimeError, OSError) as error:
            answer.set_exception(error)
        finally:
            if not answer.done():  # an error that nobody thought of: who waits must not wait on
                answer.set_exception(sys.exc_info()[1])

    def _asked_until_answered(self, body: bytes, names: Sequence[str], num_clips: int) -> Tensor:
        began: float | None = None
        wait_s = _FIRST_WAIT_S
        while True:
            if self._closed.is_set():
                raise RuntimeError(f"the scorer {self._line.name} was closed while it was asked")
            try:
                if began is not None:
                    self._look()  # before many bytes are sent once more
                score_KB = self._line.score(body, names, num_clips)
            except _UnansweredError as fault:
                now = self._now()
                began = now if began is None else began
                left_s = self._config.patience_s - (now - began)
                if left_s <= 0:
                    raise RuntimeError(
                        f"scorer {self._line.name} has not answered for "
                        f"{log.format_duration(now - began)} ({fault}): the run ends "
                        "(reward.service.patience_s); see why, and start the run again"
                    ) from fault
                self._outage.note(self._line.name, fault, self._config.patience_s)
                self._wait(min(max(wait_s, min(fault.wait_s, _LAST_WAIT_S)), left_s))
                wait_s = min(2 * wait_s, _LAST_WAIT_S)
            else:
                self._outage.over(self._line.name)
                return score_KB

    def _look(self) -> None:
        """Whether the server is there, with what is asked of it. Its own child is started again."""
        if self._line.child is not None:
            self._line.child.revive()
        offer = self._line.health()
        lost = [name for name in self.components if name not in offer.components]
        if lost:
            raise _UnansweredError(f"it has no longer {lost}, only {list(offer.components)}")


def connect(
    config: ServiceConfig, names: Sequence[str], *, device: torch.device | str = "auto",
    recipe: Path | RunConfig | RewardConfig | None = None, folder: Path | None = None,
    start_limit_s: float = 600.0,
) -> list[RemoteReward]:  # fmt: skip
    """The servers that have these components, each component at the first that has it.

    Args:
        config: where they are, or that one is to be started.
        names: components that are needed.
        device: where a server that is started scores.
        recipe: of a server that is started: a file, or settings.
        folder: where such a server's log is kept; None drops it at the end.
        start_limit_s: a server that has not answered by then is missing.

    Raises:
        ValueError: a component that no server has, a wrong token, a recipe that does not do.
        RuntimeError: a server that does not answer.
    """
    names = tuple(dict.fromkeys(names))
    if not config.spawn and not config.urls:
        raise ValueError("reward.service names no server: set reward.service.urls or spawn")
    with ExitStack() as opened:
        servers: list[str | SpawnedServer] = list(config.urls)
        if config.spawn:
            if recipe is None:
                raise ValueError("reward.service.spawn starts a server: connect needs its recipe")
            servers = [SpawnedServer(recipe, names, timeout_s=config.timeout_s, device=device,
                                     folder=folder)]  # fmt: skip
        lines = [_Line(server, config.timeout_s) for server in servers]
        for line in lines:
            opened.callback(line.close)
        deadline = time.monotonic() + start_limit_s
        offers = [_first_offer(line, deadline, start_limit_s) for line in lines]
        shares = _shared(names, [offer.components for offer in offers])
        missing = [name for name in names if name not in {n for share in shares for n in share}]
        if missing:
            have = {line.name: list(o.components) for line, o in zip(lines, offers, strict=True)}
            raise ValueError(f"no scorer has {missing}: there are {have}. Serve them "
                             "(tools/serve_rewards.py --components), or drop them")  # fmt: skip
        opened.pop_all()
    rewards = []
    for line, offer, share in zip(lines, offers, shares, strict=True):
        if share:
            rewards.append(RemoteReward(line, share, offer, config))
        else:
            logger.warning("scorer %s is not needed: others have all of %s", line.name, list(names))
            line.close()
    return rewards


def _shared(names: Sequence[str], offered: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Which of `names` each server scores: those that none before it offers."""
    first = {name: i for i, offer in reversed([*enumerate(offered)]) for name in offer}
    return [tuple(n for n in names if first.get(n) == i) for i in range(len(offered))]


def _first_offer(line: _Line, deadline: float, limit_s: float) -> _Offer:
    """Health of a server that may still be starting."""
    said, wait_s = time.monotonic(), 0.1
    while True:
        dead = line.child.fault() if line.child is not None else None
        if dead is not None:
            raise ValueError(f"the scorer that reward.service.spawn starts does not start: {dead}")
        try:
            return line.health()
        except _UnansweredError as fault:
            now = time.monotonic()
            if now >= deadline:
                raise RuntimeError(
                    f"scorer {line.name} has not answered within {limit_s:g} s ({fault}): start "
                    "it with python -m tools.serve_rewards RECIPE, or see its log"
                ) from fault
            if now - said >= _SAY_EVERY_S:
                said = now
                logger.warning("waiting for scorer %s (%s)", line.name, fault)
            time.sleep(min(wait_s, max(0.0, deadline - now)))
            wait_s = min(2 * wait_s, 2.0)
