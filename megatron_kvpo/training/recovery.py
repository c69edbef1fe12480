"""When a run saves, what it does about saves that fail, and how it ends when it is asked to.

Everything that ranks tell each other here happens between two updates, on the main thread.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_kvpo.checkpoint.state import Saving, newest_sound, retire
from megatron_kvpo.config import CheckpointConfig
from megatron_kvpo.log import get_logger
from megatron_kvpo.parallel.groups import Ranks, is_first

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it takes the machines: Slurm's --signal=B:USR1@120, or SIGTERM."""


def checkpoint_to_resume(config: CheckpointConfig, folder: Path, ranks: Ranks) -> Path | None:
    """The newest sound one, if the run is to go on from any. Collective.

    A run that starts anew sets those that it finds aside. ValueError if `config.resume` is must and
    there is none, or if all are damaged.
    """
    if not config.resume:
        if config.every:
            retire(folder, ranks)
        return None
    found = newest_sound(folder, ranks)
    if found is None and config.resume == "must":
        raise ValueError(
            f"checkpoint.resume is must and {folder} has 0 checkpoints: give the name and "
            "folder of the run that is to go on, or set checkpoint.resume=auto"
        )
    return found


class StopSignal:
    """Which of SIGNALS this process got last; they end nothing while `watched`."""

    def __init__(self) -> None:
        self.number = 0
        """0: none."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, SIGNALS are noted only. Outside the main thread nothing is watched."""
        with ExitStack() as stack:
            try:
                for number in SIGNALS:
                    before = signal.signal(number, self._note)
                    stack.callback(signal.signal, number, before)
            except ValueError:  # only the main thread may
                logger.warning("signals are not watched: this is not the main thread")
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number


class Saver:
    """The checkpoints of one run, written at once or in the background."""

    def __init__(self, config: CheckpointConfig, folder: Path, ranks: Ranks, saved: int) -> None:
        """`saved`: updates that are safe already, as those of the checkpoint it resumed from."""
        self._config, self._folder, self._ranks = config, folder, ranks
        self._saving: Saving | None = None
        self._failures = 0
        self.saved = saved
        """Updates that the newest checkpoint has, published or on its way."""

    @property
    def writing(self) -> bool:
        """Whether this rank's files of a checkpoint are still being written."""
        return self._saving is not None and not self._saving.done

    def save(self, step: int, make: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Save what `make` returns, after a save that is going on. Collective.

        `last`: no later save will make up for it: it is written at once, and may not fail.

        Raises:
            OSError: it failed, and so did more saves in a row than the settings tolerate.
        """
        self.settle(last=False)
        background = self._config.background and not last
        try:
            self._saving = Saving(self._folder, step, make(), self._ranks, self._config.keep,
                                  background=background)  # fmt: skip
        except OSError as error:
            self._bear(error, last)
            return
        self.saved = step
        if not background:
            self.settle(last=last)

    def settle(self, *, last: bool = False) -> None:
        """Publish what is being written, waiting for it. Collective. See `save`."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.finish()
            self._failures = 0
        except OSError as error:
            self.saved = min(self.saved, saving.step - 1)
            self._bear(error, last)

    def _bear(self, error: OSError, last: bool) -> None:
        """Warn of a failed save, or give up. The same on all ranks."""
        self._failures += 1
        most = self._config.tolerated_failures
        if last or self._failures > most:
            raise OSError(f"{error} (failure {self._failures} in a row)") from error
        if is_first(self._ranks):
            logger.warning(
                "%s. The run goes on: %d of %d failures in a row that "
                "checkpoint.tolerated_failures allows", error, self._failures, most,
            )  # fmt: skip
