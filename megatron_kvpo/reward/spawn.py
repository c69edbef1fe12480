"""A scoring server in a child process of this one, ended with it and started again if it dies."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

import megatron_kvpo
from megatron_kvpo import log, settings
from megatron_kvpo.config import RewardConfig, RunConfig

TOKEN_VARIABLE = "MEGATRON_KVPO_REWARD_TOKEN"
"""Of the environment: what requests must bring."""

logger = log.get_logger(__name__)

_ROOT = Path(megatron_kvpo.__file__).resolve().parents[1]
_END_S = 10.0  # a server that is asked to end has so long before it is killed
_TAIL = 1500  # characters of its log that a message shows
_LIMITS = ("--max-bytes", str(2**36), "--max-pixels", str(2**34), "--max-waiting", "64")


class SpawnedServer:
    """`python -m tools.serve_rewards` on a free loopback port, with a token of its own."""

    def __init__(
        self, recipe: Path | RunConfig | RewardConfig, names: Sequence[str], *, timeout_s: float,
        device: torch.device | str = "auto", folder: Path | None = None,
    ) -> None:  # fmt: skip
        """Start it; it answers some seconds later.

        Args:
            recipe: a file, or settings that are written to one.
            names: components that it offers.
            timeout_s: of a request.
            device: where it scores.
            folder: keeps its log; None is a temporary one.

        Raises:
            ValueError: there is no server to start.
        """
        if not (_ROOT / "tools" / "serve_rewards.py").is_file():
            raise ValueError(
                f"reward.service.spawn starts tools/serve_rewards.py, which is not in {_ROOT}: "
                "run from a checkout, or start a server there and name it in reward.service.urls"
            )
        self.token = secrets.token_hex(32)
        self._own = Path(tempfile.mkdtemp(prefix="kvpo_scorer_"))
        self._port_file = self._own / "port"
        kept = folder or self._own  # may be shared by many hosts
        kept.mkdir(parents=True, exist_ok=True)
        self._log_file = kept / f"scorer_{socket.gethostname()}_{os.getpid()}.log"
        self._lock, self._closed, self._owner = threading.Lock(), False, os.getpid()
        self._command = [
            sys.executable, "-m", "tools.serve_rewards", str(self._written(recipe)),
            "--components", ",".join(names), "--port", "0", "--port-file", str(self._port_file),
            "--device", str(device), "--timeout", str(timeout_s), "--parent", str(os.getpid()),
            *_LIMITS,
        ]  # fmt: skip
        self._process = self._start()
        atexit.register(self.close)

    def _written(self, recipe: Path | RunConfig | RewardConfig) -> Path:
        if isinstance(recipe, Path):
            return recipe
        config = RunConfig(reward=recipe) if isinstance(recipe, RewardConfig) else recipe
        path = self._own / "recipe.yaml"
        settings.dump(config, path)
        return path

    def _start(self) -> subprocess.Popen[bytes]:
        self._port_file.unlink(missing_ok=True)
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, TOKEN_VARIABLE: self.token, "PYTHONPATH": path}
        with self._log_file.open("ab") as log_file:
            return subprocess.Popen(
                self._command, env=environment, stdin=subprocess.DEVNULL, stdout=log_file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        return self._process.pid

    @property
    def url(self) -> str | None:
        """Its address, once it has one; another one after it was started again."""
        try:
            return f"http://127.0.0.1:{int(self._port_file.read_text())}"
        except FileNotFoundError:
            return None

    def fault(self) -> str | None:
        """Why it has ended, if it has: its exit code and the end of its log."""
        code = self._process.poll()
        if code is None:
            return None
        said = self._log_file.read_text(errors="replace")[-_TAIL:].strip()
        return f"it ended with {code}; its log ends: {said or '(nothing)'}"

    def revive(self) -> None:
        """Start it again if it has ended. RuntimeError after close()."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the scorer is closed")
            fault = self.fault()
            if fault is not None:
                logger.warning("the scorer of this process is started again: %s", fault)
                self._process = self._start()

    def close(self) -> None:
        """End it: it answers what it is at, for ten seconds at most."""
        with self._lock:
            if self._closed or os.getpid() != self._owner:
                return
            self._closed = True
            atexit.unregister(self.close)
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            shutil.rmtree(self._own, ignore_errors=True)
