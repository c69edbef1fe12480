"""Saving and resuming a run: Megatron's sharded checkpoints, published whole or not at all.

    folder/step_00000010/    one checkpoint, readable under any layout of ranks
    folder/latest.json       {"step": 10, "checkpoint": "step_00000010"}, for people and scripts

A checkpoint is written under a hidden name and renamed when every rank is done. Tensors are written
by the ranks' own processes: no helper process is started, so scripts need no `__main__` guard.

Megatron's and torch's readers unpickle the table of tensors: load from folders you trust only.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from megatron_kvpo.model.lora import partition_of
from megatron_kvpo.parallel.groups import Ranks, is_first

_NAME = re.compile(r"step_(\d{8,})")
_NEEDED = ("metadata.json", ".metadata")
"""Megatron's marker, written last, and torch's table of tensors."""

_PICKLE_STOP = b"."
"""Last byte of torch's table when it was written to its end."""

_UNREADABLE = (
    "checkpoint {path} cannot be read: {cause}. Delete it to resume from the one before, or "
    "restore its files"
)


@functools.cache
def _strategy() -> Any:
    """Megatron's torch_dist format, written by this process instead of forked ones."""
    from megatron.core.dist_checkpointing.strategies import torch as format

    class InProcess(format.TorchDistSaveShardedStrategy):  # type: ignore[misc]
        def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
            tensors, _, _ = format._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, True
            )
            write_tensors(
                format.mcore_to_pyt_state_dict(tensors, False),
                storage_writer=FileSystemWriter(checkpoint_dir, thread_count=1),
                planner=format.MCoreSavePlanner(
                    dedup_replicated_tensors=False, flatten_state_dict=False
                ),
            )

    return InProcess("torch_dist", 1, thread_count=1)


def save(folder: Path, step: int, tree: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write checkpoint number `step` and drop all but the newest `keep`. Collective.

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
    if step < 0 or keep < 1:
        raise ValueError(
            f"checkpoint of step {step} with checkpoint.keep {keep}: a step is at least 0, and at "
            "least 1 checkpoint must be kept"
        )
    from megatron.core import dist_checkpointing

    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    if is_first(ranks):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        dist_checkpointing.save(tree, str(partial), _strategy())
    except CheckpointException as error:  # no Exception: it would end the run without a word
        raise OSError(
            f"checkpoint {final} was not written: {_cause(error)}. The one before is untouched; "
            "see that the disk has room and every rank may write there"
        ) from error
    if is_first(ranks):
        _publish(partial, final)
        _drop_old(folder, keep)
    dist.barrier()
    return final


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
    step = int(final.name.removeprefix("step_"))
    draft.write_text(json.dumps({"step": step, "checkpoint": final.name}) + "\n")
    draft.replace(latest)


def _drop_old(folder: Path, keep: int) -> None:
    for path in _complete(folder)[keep:]:
        shutil.rmtree(path)


def _complete(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name)]
    whole = [path for path in found if not _missing(path)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


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


def load(path: Path, tree: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Read a checkpoint into the layout that `tree` asks for. Collective.

    Args:
        path: one checkpoint, e.g. from `newest`.
        tree: sharded state dict of the run as it is now: its tensors say which part of each saved
            tensor this rank takes, whatever the layout that wrote it, and are overwritten. Parts of
            the checkpoint that it does not name stay unread.
        ranks: who loads.

    Returns:
        `tree`, with loaded tensors in place of ShardedTensors, and the saved plain objects.

    Raises:
        ValueError: there is no whole checkpoint at `path`, it lacks a tensor of `tree`, or a file
            of it cannot be read.
    """
    check_whole(path)
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

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
