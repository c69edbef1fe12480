"""Score clips for runs in other processes or on other machines.

    python -m tools.serve_rewards RECIPE [section.key=value ...]
    python -m tools.serve_rewards RECIPE --components hpsv3 --host 0.0.0.0 --port 8100

Serves the rewards of a recipe, trained and held-out ones, or those of --components. POST /score
takes clips as application/safetensors (megatron_kvpo/reward/wire.py) or one video/mp4 with its
spans as JSON in X-Clip-Spans, and answers {"components": [K], "scores": [K][B]}; X-Components: a,b
asks for some only; Server-Timing: score;dur=MS says how long scoring took, with all requests that
were scored together. GET /health says what is served. If the environment has
MEGATRON_KVPO_REWARD_TOKEN, requests must bring it: Authorization: Bearer TOKEN; an address that
other machines reach is served with a token only. SIGTERM answers what waits and ends with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import io
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import av
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from megatron_kvpo import __version__, log
from megatron_kvpo.config import load_config
from megatron_kvpo.records import Clip
from megatron_kvpo.reward import wire
from megatron_kvpo.reward.base import build_rewards
from megatron_kvpo.reward.spawn import TOKEN_VARIABLE
from tools.reward_worker import ScoreError, Worker

logger = log.get_logger("megatron_kvpo.tools.serve_rewards")

VIDEO_TYPE = "video/mp4"
_KEEP_ALIVE_S = 120  # longer than a client keeps an idle connection
_DRAIN_S = 5.0  # a refused body is read so long, or the refusal would be lost with the connection


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request, and all together, may take."""

    max_bytes: int = 512 * 2**20
    max_clips: int = 64
    max_pixels: int = 2**28
    max_waiting: int = 16
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ValueError(f"--{field.name.replace('_', '-')} {value} must be above 0")


class Service:
    """The HTTP side: who may ask, how much, and in which form."""

    def __init__(self, worker: Worker, limits: Limits, token: str | None, device: str) -> None:
        """`token` None asks for none."""
        self._worker, self._limits, self._token, self._device = worker, limits, token, device
        self._admitted = 0

    def app(self) -> FastAPI:
        """The application."""

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with self._worker.running():
                yield

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        app.add_api_route("/score", self.score, methods=["POST"], response_model=None)
        return app

    async def health(self, request: Request) -> dict[str, Any]:
        """That it lives; to who has the token, also what it serves and has done."""
        if self._token is not None and "authorization" not in request.headers:
            return {"status": "ok"}
        self._authorise(request)
        return {
            "status": "ok", "components": list(self._worker.components), "device": self._device,
            "waiting": self._admitted, "scored": self._worker.scored,
            "seconds": round(self._worker.seconds, 3), "version": __version__,
            "max_bytes": self._limits.max_bytes, "max_clips": self._limits.max_clips,
        }  # fmt: skip

    async def score(self, request: Request) -> Response:
        """Scores of a body's clips, or why not."""
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._answer(request)
        except TimeoutError:
            raise HTTPException(504, f"not scored within {self._limits.timeout_s:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body was cut short") from None
        except HTTPException:
            await self._drain(request)
            raise

    async def _answer(self, request: Request) -> Response:
        self._authorise(request)
        kind = _media_type(request)
        try:
            components = self._asked_for(request)
            with self._admission():
                body = await self._read(request)
                clips = await asyncio.to_thread(self._decode, kind, body, request)
                del body
                scored = await self._worker.score(clips, components)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        except ScoreError as error:
            raise HTTPException(500, str(error)) from None
        answer = {"components": components, "scores": scored.score_KB.double().tolist()}
        took = {"Server-Timing": f"score;dur={1000 * scored.seconds:.3f}"}
        return Response(json.dumps(answer, allow_nan=False), headers=took,
                        media_type="application/json")  # fmt: skip

    def _authorise(self, request: Request) -> None:
        if self._token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not same:
            raise HTTPException(401, "a token is needed: Authorization: Bearer, with what the "
                                f"server's {TOKEN_VARIABLE} holds",
                                headers={"WWW-Authenticate": "Bearer"})  # fmt: skip

    def _asked_for(self, request: Request) -> list[str]:
        """Components of the header, or all."""
        known = self._worker.components
        named = request.headers.get("x-components")
        asked = list(known) if named is None else [name.strip() for name in named.split(",")]
        unknown = [name for name in asked if name not in known]
        if unknown or len(set(asked)) != len(asked):
            raise ValueError(f"X-Components {asked[:20]}: ask once for some of {list(known)}")
        return asked

    @contextmanager
    def _admission(self) -> Iterator[None]:
        """A place among those that wait, taken before the body is read."""
        if self._admitted >= self._limits.max_waiting:
            raise HTTPException(503, f"{self._admitted} requests wait already: ask again later",
                                headers={"Retry-After": "1"})  # fmt: skip
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def _read(self, request: Request) -> bytearray:
        most = self._limits.max_bytes
        too_large = HTTPException(413, f"the body exceeds {most} bytes: send fewer clips, send "
                                  "uint8, or serve with a larger --max-bytes")  # fmt: skip
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return body

    async def _drain(self, request: Request) -> None:
        """Read on without keeping anything, so that who still sends gets to see the answer."""
        left = self._limits.max_bytes
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):  # already read
            async with asyncio.timeout(_DRAIN_S):
                async for chunk in request.stream():
                    left -= len(chunk)
                    if left < 0:
                        return

    def _decode(self, kind: str, body: bytearray, request: Request) -> list[Clip]:
        limits = self._limits
        if kind == wire.MEDIA_TYPE:
            return wire.decode(body, max_clips=limits.max_clips, max_pixels=limits.max_pixels)
        return [decode_video(body, request.headers.get("x-clip-spans"), limits.max_pixels)]


def _media_type(request: Request) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (wire.MEDIA_TYPE, VIDEO_TYPE):
        why = "pickles are never read" if "pickle" in kind else f"{kind[:80]!r} is not read"
        raise HTTPException(415, f"{why}: send {wire.MEDIA_TYPE} or {VIDEO_TYPE}")
    return kind


def decode_video(body: bytes | bytearray, spans: str | None, max_pixels: int) -> Clip:
    """An mp4 file as a clip, float32 RGB in [0, 1]. ValueError: no video, no spans, too large."""
    if spans is None:
        raise ValueError(
            'X-Clip-Spans is missing: JSON like [{"start": 0, "stop": 81, "text": ""}]'
        )
    said = wire.parse_json(spans.encode("latin-1"), "X-Clip-Spans")
    frames, room = [], max_pixels
    try:
        # The format is given: other ones (playlists) may open further files or addresses.
        with av.open(io.BytesIO(body), format="mp4") as container:
            if not container.streams.video:
                raise ValueError("the mp4 file holds no video")
            for frame in container.decode(container.streams.video[0]):
                room -= frame.width * frame.height
                if room < 0:
                    raise ValueError(f"the video has more than {max_pixels} pixels: send less")
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    except av.FFmpegError as error:
        raise ValueError(f"the body cannot be decoded as mp4: {error.strerror}") from None
    if len({frame.shape for frame in frames}) != 1:
        raise ValueError(f"the video's {len(frames)} pixel frames are not of one size")
    pixels = torch.stack(frames).permute(0, 3, 1, 2).float().div_(255)
    return wire.made_clip("X-Clip-Spans", pixels.contiguous(), said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM. ValueError for what cannot be served, before anything is."""
    options = _parse(arguments)
    if options.parent is not None:
        threading.Thread(target=_end_with, args=(options.parent,), daemon=True).start()
    log.setup(True)
    token = os.environ.get(TOKEN_VARIABLE) or None
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    with bound_socket(options.host, options.port, token) as bound:
        port = bound.getsockname()[1]
        if options.port_file is not None:
            _write_whole(options.port_file, f"{port}\n")
        config = load_config(options.recipe, options.overrides)
        names = options.components or [*config.reward.weights, *config.reward.held_out]
        if not names:
            raise ValueError(f"{options.recipe} names no rewards: set reward.weights, --components")
        has_gpu = options.device == "auto" and torch.cuda.is_available()
        device = options.device if options.device != "auto" else "cuda" if has_gpu else "cpu"
        rewards = build_rewards(names, config.reward, torch.device(device))
        worker = Worker(rewards, names, limits.max_clips, options.batch_wait_ms / 1000)
        app = Service(worker, limits, token, device).app()
        host = f"[{options.host}]" if ":" in options.host else options.host
        said = {"url": f"http://{host}:{port}", "components": names, "device": device}
        server = Server(app, said)
        signal.signal(signal.SIGTERM, server.handle_exit)  # uvicorn raises it again at the end
        server.run(sockets=[bound])
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """Says where it listens as soon as it does."""

    def __init__(self, app: FastAPI, said: dict[str, Any]) -> None:
        """`said` is the url, the components and the device."""
        super().__init__(uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", ws="none", http="h11",
            timeout_keep_alive=_KEEP_ALIVE_S, server_header=False, backlog=128,
        ))  # fmt: skip
        self._said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        await super().startup(sockets)
        logger.info("%s serves %s on %s", *(self._said[k] for k in ("url", "components", "device")))
        log.emit_result(json.dumps(self._said))


def bound_socket(host: str, port: int, token: str | None) -> socket.socket:
    """A socket that is bound and does not listen yet. ValueError: not to be had, or unguarded."""
    if token is None and not _is_loopback(host):
        raise ValueError(f"--host {host} is open to other machines: set {TOKEN_VARIABLE}, or serve "
                         "127.0.0.1")  # fmt: skip
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ValueError(f"--host {host} --port {port} cannot be had ({error}): "
                         "name another; 0 takes any that is free") from None  # fmt: skip
    return bound


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _end_with(parent: int) -> None:
    """Ends this process when `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # for what waits
    os._exit(1)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    usual = Limits()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--components", type=_names, help="a,b; default: the recipe's rewards")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100, help="0: any that is free")
    parser.add_argument("--port-file", type=Path, help="the port is written here")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--max-bytes", type=int, default=usual.max_bytes, help="of a body")
    parser.add_argument("--max-clips", type=int, default=usual.max_clips, help="scored at once")
    parser.add_argument("--max-pixels", type=int, default=usual.max_pixels, help="of a clip")
    parser.add_argument("--max-waiting", type=int, default=usual.max_waiting, help="requests")
    parser.add_argument("--timeout", dest="timeout_s", type=float, default=usual.timeout_s,
                        help="seconds of a request")  # fmt: skip
    parser.add_argument("--batch-wait-ms", type=float, default=5.0, help="for others to join")
    parser.add_argument("--parent", type=int, help="end when this process is not the parent")
    return parser.parse_intermixed_args(arguments)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


if __name__ == "__main__":
    try:
        log.run_command(main, logger)
    except KeyboardInterrupt:
        sys.exit(130)
