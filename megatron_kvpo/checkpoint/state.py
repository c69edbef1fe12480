"""Saving and resuming a run: Megatron's sharded checkpoints, published whole or not at all.

    folder/step_00000010/    one checkpoint, readable under any layout of ranks
    folder/latest.json       {"step": 10, "checkpoint": "step_00000010"}, for people and scripts

A checkpoint is written under a hidden name and renamed when every rank is done, with a sum over
every file in it (checksums.py). Tensors are written by the ranks' own processes (writing.py): no
helper process is started, so scripts need no `__main__` guard.

Megatron's and torch's readers unpickle the table of tensors: load from folders you trust only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_kvpo.checkpoint.checksums import damage, read_sums
from megatron_kvpo.checkpoint.writing import Writing, together
from megatron_kvpo.log import get_logger
from megatron_kvpo.model.lora import partition_of
from megatron_kvpo.parallel.groups import Ranks, is_first

logger = get_logger(__name__)

_NAME = re.compile(r"step_(\d{8,})")
COMMON_FILE = "common.pt"
"""Where megatron-core 0.16 keeps what is no tensor."""

_NEEDED = ("metadata.json", ".metadata")
"""Megatron's marker, written last, and torch's table of tensors."""

_PICKLE_STOP = b"."
"""Last byte of torch's table when it was written to its end."""

_UNREADABLE = (
    "checkpoint {path} cannot be read: {cause}. Delete it to resume from the one before, or "
    "restore its files"
)


class Saving:
    """A checkpoint on its way: `finish` it on all ranks, and nothing is published before."""

    def __init__(
        self, folder: Path, step: int, tree: dict[str, Any], ranks: Ranks, keep: int,
        *, background: bool = False,
    ) -> None:  # fmt: skip
        """Write the checkpoint, or begin to. Collective.

        Args:
            folder: see `save`, which names the other arguments too.
            step: updates done.
            tree: what is saved.
            ranks: who saves.
            keep: checkpoints that remain.
            background: copy this rank's tensors to the host and write them from a thread; the
                caller may change them at once. The files are the same.

        Raises:
            ValueError: `step` is negative or `keep` is below 1.
            OSError: a rank could not begin.
        """
        if step < 0 or keep < 1:
            raise ValueError(
                f"checkpoint of step {step} with checkpoint.keep {keep}: a step is at least 0, and "
                "at least 1 checkpoint must be kept"
            )
        self.step, self._ranks, self._keep = step, ranks, keep
        self.path = folder / f"step_{step:08d}"
        self._partial = folder / f".{self.path.name}.partial"
        try:
            together(self._make_room)
            self._writing = _write_tree(tree, self._partial, background)
        except OSError as error:
            raise self._failed(error) from error

    @property
    def done(self) -> bool:
        """Whether this rank is through: `finish` waits for other ranks only."""
        return self._writing.done

    def finish(self) -> Path:
        """Wait for all ranks, then give the checkpoint its name. Collective.

        OSError if a rank could not write; earlier checkpoints are untouched.
        """
        try:
            self._writing.finish()
            together(self._publish)
        except OSError as error:
            raise self._failed(error) from error
        return self.path

    def _make_room(self) -> None:
        if is_first(self._ranks):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)

    def _publish(self) -> None:
        if is_first(self._ranks):
            _publish(self._partial, self.path)
            _drop_old(self.path.parent, self.step, self._keep)

    def _failed(self, error: OSError) -> OSError:
        return OSError(
            f"checkpoint {self.path} was not written: {error}. The one before is untouched; "
            "see that the disk has room and every rank may write there"
        )


def _write_tree(tree: dict[str, Any], partial: Path, background: bool) -> Writing:
    """Megatron's torch_dist format, written by this process instead of forked ones.

    What several ranks hold alike is divided over them: each writes its part.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import torch as format
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    begun: list[Writing] = []

    class InProcess(format.TorchDistSaveShardedStrategy):  # type: ignore[misc]
        def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
            tensors, _, _ = format._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, True
            )
            planner = format.MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False
            )
            state = format.mcore_to_pyt_state_dict(tensors, False)
            begun.append(Writing(Path(checkpoint_dir), state, planner, background=background))

    shared = FullyParallelSaveStrategyWrapper(InProcess("torch_dist", 1, thread_count=1))
    dist_checkpointing.save(tree, str(partial), shared)
    return begun[0]


def save(folder: Path, step: int, tree: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write checkpoint number `step` and drop all but the newest `keep` up to it. Collective.

    Args:
        folder: of the run's checkpoints; made if absent. All ranks must see the same one.
        step: updates done; a checkpoint of the same step is replaced.
        tree: Megatron sharded state dict: ShardedTensors, and plain objects, which are taken from
            the first rank. Plain: tensors, numbers, strings, and lists and dicts of them; a reader
            may refuse other classes.
        ranks: who saves.
        keep: checkpoints that remain, this one among them.

    Returns:
        The published folder.

    Raises:
        ValueError: `step` is negative or `keep` is below 1.
        OSError: a rank could not write; earlier checkpoints are untouched.
    """
    return Saving(folder, step, tree, ranks, keep).finish()


def _publish(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its name and point latest.json at it."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    latest = final.with_name("latest.json")
    draft = final.with_name(".latest.json")
    draft.write_text(json.dumps({"step": _step(final), "checkpoint": final.name}) + "\n")
    draft.replace(latest)


def _drop_old(folder: Path, step: int, keep: int) -> None:
    """Those of later steps are another run's, and are not counted."""
    for path in [path for path in _complete(folder) if _step(path) <= step][keep:]:
        shutil.rmtree(path)


def _named(folder: Path) -> list[Path]:
    """What bears a checkpoint's name, newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _complete(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return [path for path in _named(folder) if not _missing(path)]


def _missing(path: Path) -> list[str]:
    """Which of the files that a finished checkpoint has are absent or cut short."""
    absent = [name for name in _NEEDED if not (path / name).is_file()]
    if not absent:
        with (path / ".metadata").open("rb") as table:
            table.seek(max(0, table.seek(0, os.SEEK_END) - 1))
            if table.read() != _PICKLE_STOP:
                return [".metadata"]
    return absent


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None. Half-written ones do not count."""
    return next(iter(_complete(folder)), None)


def newest_sound(folder: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint in `folder` whose files are those that were written. Collective.

    Ranks share the reading. A damaged one is named in a warning, with its files, and renamed to
    `<name>.damaged` once an older one is found to be sound. None if there is no checkpoint at all;
    ValueError if there are some and all of them are damaged.
    """
    (paths, *_) = together(lambda: _named(folder) if is_first(ranks) else [])
    damaged: list[str] = []
    for path in paths:
        faults = damage_of(path, ranks)
        if not faults:
            together(lambda: _set_aside(folder, damaged, "damaged") if is_first(ranks) else None)
            return path
        damaged.append(path.name)
        if is_first(ranks):
            logger.warning("checkpoint %s is damaged: %s", path, "; ".join(faults))
    if damaged:
        raise ValueError(
            f"none of the {len(damaged)} checkpoints in {folder} is sound (see the warnings): "
            "restore one, or start anew with checkpoint.resume=never"
        )
    return None


def retire(folder: Path, ranks: Ranks) -> None:
    """Rename every checkpoint in `folder` to `<name>.old`: a run that starts anew is not theirs."""
    if is_first(ranks) and (names := [path.name for path in _named(folder)]):
        _set_aside(folder, names, "old")
        logger.warning("starting anew: %s in %s are now <name>.old", ", ".join(names), folder)


def _set_aside(folder: Path, names: list[str], ending: str) -> None:
    for name in names:
        aside = folder / f"{name}.{ending}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / name).rename(aside)


def damage_of(path: Path, ranks: Ranks) -> list[str]:
    """What is wrong with a checkpoint's files, the same on every rank. Collective.

    Only that none is absent or cut short, where it has no checksums.json.
    """
    try:
        missing = _missing(path)
        sums, said = read_sums(path), [f"{name} is missing or cut short" for name in missing]
    except (OSError, ValueError) as error:
        sums, said = {}, [str(error)]
    own = damage(path, sums, sorted(sums)[ranks.rank :: ranks.world])
    told = together(lambda: (own, said))
    faults = sorted({fault for part, _ in told for fault in part})
    return faults or sorted({fault for _, part in told for fault in part})


def load(
    path: Path, tree: dict[str, Any], ranks: Ranks, *, checked: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Read a checkpoint into the layout that `tree` asks for. Collective.

    Args:
        path: one checkpoint, e.g. from `newest`.
        tree: sharded state dict of the run as it is now: its tensors say which part of each saved
            tensor this rank takes, whatever the layout that wrote it, and are overwritten. Parts of
            the checkpoint that it does not name stay unread.
        ranks: who loads.
        checked: its files are known to be sound; they are compared with their sums otherwise.

    Returns:
        `tree`, with loaded tensors in place of ShardedTensors, and the saved plain objects.

    Raises:
        ValueError: there is no whole checkpoint at `path`, it lacks a tensor of `tree`, a file
            of it cannot be read, or a later megatron-core wrote it than is here.
    """
    check_whole(path)
    if not checked and (faults := damage_of(path, ranks)):
        raise ValueError(_UNREADABLE.format(path=path, cause="; ".join(faults)))
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    apart = not hasattr(dist_checkpointing.serialization, "_legacy_common_state_exists")
    if apart and not (path / COMMON_FILE).is_file():
        raise ValueError(
            f"checkpoint {path} has no {COMMON_FILE}: megatron-core 0.19 wrote it, or another that "
            f"keeps such things among the tensors, and {version('megatron-core')} reads none of "
            "these. Resume with the later one, which reads both"
        )
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(tree, str(path), strict="raise_unexpected")
    except (CheckpointingException, CheckpointException) as error:
        cause = _cause(error)
        if isinstance(cause, CheckpointingException):
            raise ValueError(
                f"checkpoint {path} does not fit this run: {cause}. Resume with the model and "
                "policy settings it was saved with, or start in another folder"
            ) from error
        raise ValueError(_UNREADABLE.format(path=path, cause=cause)) from error
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(_UNREADABLE.format(path=path, cause=error)) from error
    return loaded


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed: torch wraps it and tells all ranks."""
    while isinstance(error, CheckpointException):
        _, (error, _) = min(error.failures.items())
    return error


def check_whole(path: Path) -> None:
    """ValueError unless `path` is a checkpoint written to its end."""
    if not path.is_dir():
        raise ValueError(
            f"no checkpoint folder at {path}: give one named step_<number>, or set "
            "checkpoint.resume to false to start anew"
        )
    missing = _missing(path)
    if missing:
        raise ValueError(
            f"{path} lacks {missing} or their ends: it is half-written or no checkpoint of this "
            "project. Give another step_<number> folder, or delete this one"
        )


def shard_parameters(parameters: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Megatron's sharded tensors of parameters by name, cut as the parameters say.

    The parameters themselves are the data: an optimizer's sharded state needs that, and `load`
    fills them in place.
    """
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    axes = {name: dim for name, p in parameters.items() if (dim := partition_of(p)) is not None}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        dict(parameters), "", axes, tp_group=ranks.tensor.group, dp_cp_group=_replica_group()
    )
    return sharded


def _replica_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)
