"""Imports go left only: a change far right cannot break what stands left of it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.contract.sources import PACKAGE, imports, imports_of, package_files, show, tree_of

LAW: tuple[tuple[str, ...], ...] = (
    ("records", "settings", "stopwatch"),
    ("method_config",),
    ("reward_config",),
    ("config", "log"),
    ("algorithm", "flow", "routing", "world", "parallel"),
    ("model",),
    ("rollout", "reward", "data", "checkpoint"),
    ("training",),
    ("train",),
)
LEVEL = {name: level for level, names in enumerate(LAW) for name in names}

MEGATRON_SEAM = {
    "parallel/groups.py", "parallel/cpu.py", "model/specs.py", "checkpoint/state.py",
    "training/optimizer.py",
}  # fmt: skip

IMPURE = ("torch.distributed", "megatron", "yaml", "wandb", "pathlib", "os")


def room(file: Path) -> str:
    """The module or folder of the package that a file belongs to, as the law names it."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def breach(importer: str, name: str) -> str | None:
    """What is wrong with `importer` importing `name`, or None."""
    parts = name.split(".")
    if parts[0] != "megatron_kvpo" or len(parts) == 1:
        return None
    target = parts[1]
    if target not in LEVEL:
        return None if target.startswith("__") else f"{target} has no place in the law"
    if importer == target or LEVEL[target] < LEVEL[importer]:
        return None
    how = "its sibling" if LEVEL[target] == LEVEL[importer] else "to its right"
    return f"{importer} imports {target}, {how}"


def test_every_module_has_a_place_in_the_law() -> None:
    lost = {room(f) for f in package_files() if f != PACKAGE / "__init__.py"} - set(LEVEL)
    assert not lost, f"give {sorted(lost)} a place in LAW and in docs/layout.md"


def test_imports_go_left_only() -> None:
    found = []
    for file in package_files():
        if file == PACKAGE / "__init__.py":
            continue
        for name, node in imports_of(file):
            fault = breach(room(file), name)
            if fault:
                found.append(f"{show(file, node)}: {fault}")
    assert not found, "\n".join(found)


def test_the_package_itself_imports_none_of_its_modules() -> None:
    names = [name for name, _ in imports_of(PACKAGE / "__init__.py")]
    assert not [name for name in names if name.startswith("megatron_kvpo")]


def test_megatron_is_imported_at_its_seam_only() -> None:
    found = [
        show(file, node)
        for file in package_files()
        if file.relative_to(PACKAGE).as_posix() not in MEGATRON_SEAM
        for name, node in imports_of(file)
        if name.split(".")[0] == "megatron"
    ]
    assert not found, f"Megatron is reached through {sorted(MEGATRON_SEAM)}, not in {found}"


def test_algorithm_knows_no_ranks_and_no_files() -> None:
    found = [
        f"{show(file, node)}: {name}"
        for file in package_files()
        if room(file) == "algorithm"
        for name, node in imports_of(file)
        if any(name == bad or name.startswith(f"{bad}.") for bad in IMPURE)
    ]
    assert not found, "\n".join(found)


def test_nothing_shipped_imports_the_tests() -> None:
    found = [
        show(f, n) for f in package_files() for name, n in imports_of(f) if name[:5] == "tests"
    ]
    assert not found


@pytest.mark.parametrize(
    ("importer", "name", "allowed"),
    [
        ("model", "megatron_kvpo.parallel.groups", True),
        ("model", "megatron_kvpo.model.rope", True),
        ("model", "megatron_kvpo.rollout.stream", False),
        ("reward", "megatron_kvpo.data.prompts", False),
        ("records", "megatron_kvpo.settings", False),
        ("config", "megatron_kvpo.settings", True),
        ("flow", "megatron_kvpo.routing", False),
        ("flow", "megatron_kvpo.__version__", True),
        ("train", "megatron_kvpo.nowhere", False),
        ("records", "torch", True),
    ],
)
def test_the_law_is_read_right(importer: str, name: str, allowed: bool) -> None:
    assert (breach(importer, name) is None) == allowed


def test_every_form_of_import_is_seen() -> None:
    source = (
        "import megatron_kvpo.train\n"
        "from megatron_kvpo import log\n"
        "def f():\n"
        "    from . import rope\n"
        "    from ..rollout.stream import run\n"
        "    importlib.import_module('megatron_kvpo.data')\n"
    )
    names = {n for n, _ in imports(ast.parse(source), "megatron_kvpo.model.x", is_package=False)}
    assert names == {
        "megatron_kvpo.train", "megatron_kvpo.log", "megatron_kvpo.model.rope",
        "megatron_kvpo.rollout.stream.run", "megatron_kvpo.data",
    }  # fmt: skip


def test_a_relative_import_in_a_package_file_starts_at_that_package() -> None:
    tree = ast.parse("from . import rope\nfrom .. import log")
    names = {n for n, _ in imports(tree, "megatron_kvpo.model", is_package=True)}
    assert names == {"megatron_kvpo.model.rope", "megatron_kvpo.log"}


def test_the_trees_are_those_of_the_package() -> None:
    assert PACKAGE / "config.py" in package_files()
    assert any(isinstance(n, ast.ClassDef) for n in tree_of(PACKAGE / "config.py").body)
