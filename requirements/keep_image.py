"""Prints constraints for installing requirements/gpu.txt into an image that brings its own torch.

    python requirements/keep_image.py > /tmp/keep.txt
    pip install -c /tmp/keep.txt -r requirements/gpu.txt

What is compiled together with the image's torch stays at the image's version; everything else that
constraints.txt pins is as tested.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = re.compile(
    r"(pytorch-)?triton|torch(vision|audio|ao)?|transformer-engine(-.+)?|apex|flash-attn"
)

BOUND_BY_TORCH = {"setuptools"}
"""Pinned for another torch, whose bounds differ."""


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(path: Path) -> set[str]:
    """Distributions that a requirements file names."""
    lines = path.read_text().splitlines()
    return {normal(line.partition("==")[0]) for line in lines if "==" in line and line[0] != "#"}


def main() -> None:
    """Write the constraints to stdout."""
    found = {normal(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    kept = {name: version for name, version in found.items() if KEPT.fullmatch(name)}
    if "torch" not in kept:
        raise SystemExit("torch is not installed: this is for images that bring it")
    asked = named(HERE / "gpu.txt") | set(kept) | BOUND_BY_TORCH
    pins = (HERE / "constraints.txt").read_text().splitlines()
    rest = [pin for pin in pins if "==" in pin and pin[0] != "#"
            and normal(pin.partition("==")[0]) not in asked]  # fmt: skip
    lines = [*(f"{name}=={version}" for name, version in sorted(kept.items())), *rest]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
