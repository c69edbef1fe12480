"""The repository's Python files as syntax trees, for the tests that judge how they are written."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_kvpo"


@functools.cache
def tree_of(file: Path) -> ast.Module:
    """One file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def package_files() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def all_files() -> list[Path]:
    """Every Python file that people maintain: package, tools, tests, setup.py."""
    folders = (PACKAGE, ROOT / "tools", ROOT / "tests")
    return [ROOT / "setup.py", *(f for folder in folders for f in sorted(folder.rglob("*.py")))]


def shipped_files() -> list[Path]:
    """Every Python file that runs outside the tests."""
    return [f for f in all_files() if ROOT / "tests" not in f.parents]


def show(file: Path, node: ast.AST | None = None) -> str:
    """A place as `path:line`, seen from the repository's root."""
    line = getattr(node, "lineno", None)
    name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
    return f"{name}:{line}" if line else name


def module_name(file: Path) -> str:
    """Dotted name of a module of the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or an attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call and the dotted name that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[str, ast.AST]]:
    """Every imported name in full, wherever it stands: `from a import b` yields `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            for alias in node.names:
                yield f"{base}.{alias.name}", node
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value, node


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    drop = node.level - 1 if is_package else node.level
    parts = parts[: len(parts) - drop]
    return ".".join([*parts, node.module] if node.module else parts)


def imports_of(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every imported name of a module of the package, in full."""
    yield from imports(tree_of(file), module_name(file), is_package=file.name == "__init__.py")


def repository_files() -> list[Path]:
    """Files that git tracks or would track. Empty where this is no git checkout."""
    if not (ROOT / ".git").exists():
        return []
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    paths = (ROOT / name.decode() for name in listing.split(b"\0") if name)
    return sorted({path for path in paths if path.is_file()})
