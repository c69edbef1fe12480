"""What a measured figure depends on: the commit, the versions, the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "megatron-core", "numpy")


def commit() -> str:
    """Of the checkout, with `+` if files differ from it; "" outside one.

    A copy without its history names the commit that it was made from in MEGATRON_KVPO_COMMIT.
    """
    if named := os.environ.get("MEGATRON_KVPO_COMMIT"):
        return named
    here = Path(__file__).resolve().parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    if head.returncode:
        return ""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--"]
    command += [":/megatron_kvpo", ":/examples", ":/tools"]
    status = subprocess.run(command, cwd=here, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Python's and those of the packages that figures depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def write_json(found: dict[str, Any], path: Path) -> None:
    """Write a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, default=str) + "\n")


def made_by(module: str, ranks: int) -> dict[str, Any]:
    """The head of a record: when, from what, by which command, on what."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": versions(),
        "machine": machine(ranks),
    }


def machine(ranks: int) -> dict[str, str | int]:
    """The processor or the accelerator, and how many ranks used it."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return {"device": name, "cuda": str(torch.version.cuda), "ranks": ranks}
    return {"device": platform.processor() or platform.machine(), "ranks": ranks,
            "cores": os.cpu_count() or 0}  # fmt: skip
