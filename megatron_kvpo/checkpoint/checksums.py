"""Sums over a checkpoint's files: written with it, compared before it is trusted.

    step_00000010/checksums.json    {"files": {"__0_0.distcp": {"bytes": 12, "sha256": "..."}, ...}}

A checkpoint without this file is older than it, and is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from megatron_kvpo.log import get_logger

logger = get_logger(__name__)

NAME = "checksums.json"
Sum: TypeAlias = dict[str, int | str]
"""`bytes` and `sha256` of one file."""


def sum_of(path: Path) -> Sum:
    """Of one file, read as it is on disk. OSError if it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_sums(folder: Path, known: Mapping[str, Sum]) -> None:
    """Write NAME into `folder`: the sums known already, and those of every other file in it."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sums = {name: known.get(name) or sum_of(folder / name) for name in names if name != NAME}
    with (folder / NAME).open("w") as file:
        json.dump({"files": sums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_sums(folder: Path) -> dict[str, Sum]:
    """What NAME says, or nothing if there is none. ValueError if it is not what was written."""
    path = folder / NAME
    if not path.is_file():
        return {}
    try:
        files: dict[str, Sum] = json.loads(path.read_text())["files"]
        if not all({"bytes", "sha256"} <= set(known) for known in files.values()):
            raise KeyError("bytes, sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} is damaged ({error})") from error
    return files


def damage(folder: Path, sums: Mapping[str, Sum], names: Iterable[str]) -> list[str]:
    """What is wrong with those of its files: absent, shorter or longer, or other bytes."""
    found = []
    for name in names:
        path, known = folder / name, sums[name]
        try:
            size = path.stat().st_size
            if size != known["bytes"]:
                found.append(f"{name} has {size} bytes of {known['bytes']}")
            elif sum_of(path)["sha256"] != known["sha256"]:
                found.append(f"{name} holds other bytes than were written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error})")
    return found
