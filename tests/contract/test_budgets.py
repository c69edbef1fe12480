"""Sizes that keep every file readable in one sitting."""

from __future__ import annotations

import ast

from tests.contract.sources import all_files, package_files, show, tree_of

FILE_LINES = 400
FUNCTION_LINES = 60
PACKAGE_FILES = 121
"""Modules; a bare __init__.py does not count. docs/layout.md says why it is not 50."""


def test_no_file_is_longer_than_its_budget() -> None:
    lengths = {show(f): len(f.read_text(encoding="utf-8").splitlines()) for f in all_files()}
    over = {name: n for name, n in lengths.items() if n > FILE_LINES}
    assert not over, f"split these, the budget is {FILE_LINES} lines: {over}"


def test_no_function_is_longer_than_its_budget() -> None:
    over = {}
    for file in all_files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    over[f"{show(file, node)} {node.name}"] = length
    assert not over, f"split these, the budget is {FUNCTION_LINES} lines: {over}"


def test_the_package_has_no_more_files_than_its_budget() -> None:
    count = sum(f.name != "__init__.py" for f in package_files())
    assert count <= PACKAGE_FILES, (
        f"{count} files, the budget is {PACKAGE_FILES}: merge or drop first"
    )
