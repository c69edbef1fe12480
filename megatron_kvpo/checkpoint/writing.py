"""One rank's tensors on their way into a checkpoint: at once, or from a thread as the run goes on.

Ranks talk only when a `Writing` is made and finished, on the thread that does so; the threads that
write touch tensors and files alone. Both ways write the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_kvpo.checkpoint.checksums import Sum, sum_of, write_sums
from megatron_kvpo.log import get_logger

logger = get_logger(__name__)

T = TypeVar("T")

THREADS = 4
"""Of a rank that write, each a file of its own. Files depend on it, so it is the same anywhere."""


class _Writer(FileSystemWriter):
    """Torch's, without the random id and the path in its table: files depend on the run alone."""

    def storage_meta(self) -> None:
        return None


class _Held:
    """Copies of what a plan writes, in host memory."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._data: dict[Any, Any] = {}
        for item in plan.items:
            found = planner.resolve_data(item)
            if isinstance(found, Tensor):
                found = found.detach().to("cpu", copy=True)
            self._data[item.index] = found

    def resolve_data(self, item: WriteItem) -> Any:
        """What `item` writes. Each is asked for once, and let go of then."""
        return self._data.pop(item.index)


class Writing:
    """A planned checkpoint folder. `finish` it on all ranks."""

    def __init__(
        self, folder: Path, state: dict[str, Any], planner: SavePlanner, *, background: bool
    ) -> None:  # fmt: skip
        """Agree who writes what, then write it, or have it written. Collective.

        `background`: tensors are copied to the host first, so that the caller may change them at
        once; a copy of this rank's share of the checkpoint is held until it is on disk. OSError if
        a rank cannot begin.
        """
        self._folder = folder
        # No copy ahead: that would take a stream of whatever GPU a new thread stands on.
        self._writer = _Writer(folder, thread_count=THREADS, per_thread_copy_ahead=0)
        self._metadata: Metadata | None = None
        self._plan = self._agree(state, planner)
        self._results: list[Any] = []
        self._sums: dict[str, Sum] = {}
        self._error: str | None = None
        self._thread: threading.Thread | None = None
        if background:
            held = _Held(self._plan, planner)
            self._thread = threading.Thread(target=self._write, args=(held,), name="checkpoint",
                                            daemon=True)  # fmt: skip
            self._thread.start()
        else:
            self._write(planner)

    @property
    def done(self) -> bool:
        """Whether this rank has written, or failed to: `finish` will not wait for it."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for all ranks' files, then write their table and their sums. Collective.

        OSError, on every rank, if one of them failed.
        """
        if self._thread is not None:
            self._thread.join()
        told = together(lambda: (self._results, self._sums, self._error))
        failed = [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(told) if error]
        if failed:
            raise OSError("; ".join(failed))
        together(lambda: self._close([r for r, _, _ in told], [s for _, s, _ in told]))

    def _agree(self, state: dict[str, Any], planner: SavePlanner) -> SavePlan:
        """What this rank writes. The first rank makes the plan of all."""
        first = dist.get_rank() == 0
        planner.set_up_planner(state, None, first)
        self._writer.set_up_storage_writer(first)
        plans = together(lambda: self._writer.prepare_local_plan(planner.create_local_plan()))

        def whole() -> list[SavePlan] | None:
            if not first:
                return None
            every, self._metadata = planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(every)

        (every, *_) = together(whole)
        assert every is not None
        return planner.finish_plan(every[dist.get_rank()])

    def _write(self, source: Any) -> None:
        try:
            results = self._writer.write_data(self._plan, source).value()
            self._results = sorted(results, key=_place)  # threads end in any order
            names = list(dict.fromkeys(_place(result)[0] for result in self._results))
            with ThreadPoolExecutor(THREADS) as pool:
                sums = pool.map(sum_of, [self._folder / name for name in names])
                self._sums = dict(zip(names, sums, strict=True))
        except (OSError, RuntimeError) as error:  # torch's streams raise RuntimeError on full disks
            self._error = str(error)
            logger.error("checkpoint %s is not being written: %s", self._folder.name, error)

    def _close(self, results: list[list[Any]], sums: list[dict[str, Sum]]) -> None:
        if self._metadata is not None:
            self._writer.finish(self._metadata, results)
            write_sums(self._folder, {name: s for part in sums for name, s in part.items()})


def _place(result: Any) -> tuple[str, int]:
    """File, and bytes before it there, of something written."""
    return result.storage_data.relative_path, result.storage_data.offset


def together(make: Callable[[], T]) -> list[T]:
    """What `make` returns on every rank, in rank order. Collective.

    OSError on all ranks if it raised OSError, RuntimeError or ValueError on any, whichever.
    """
    own: tuple[T | None, str | None]
    try:
        own = make(), None
    except (OSError, RuntimeError, ValueError) as error:
        own = None, f"{type(error).__name__}: {error}"
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(told) if error]
    if failed:
        raise OSError("; ".join(failed))
    return [value for value, _ in told]
