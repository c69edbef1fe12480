"""Operators' documents name files, modules, options and messages that are there."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

import pytest

from tests.contract.sources import ROOT, shipped_files, tree_of
from tools import topology

PAGES = ("docs/operations.md", "docs/hardware.md", "launch/README.md")


@functools.cache
def printed() -> tuple[str, ...]:
    """Every text of the sources; what is filled in later is a NUL."""
    found: list[str] = []
    for file in shipped_files():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0"
                    for part in node.values
                ))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found += [path.read_text() for path in (ROOT / "launch").glob("*.s*")]
    return tuple(found)


def is_printed(message: str) -> bool:
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(".*?".join(parts), re.DOTALL)
    return any(pattern.search(re.sub(r"\$\w+", "\0", text)) for text in printed())


def messages() -> Iterator[str]:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.split("## When it stops")[1]
    yield from re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_operators_table_is_one_that_the_program_prints(message):
    assert is_printed(message), "nothing in the sources says so"
    assert len(message.replace("...", "").strip()) >= 15, "too little to be searched for"


def test_a_message_that_nobody_prints_is_seen():
    assert len(list(messages())) >= 20
    assert not is_printed("the ... has run out of green paint")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    for module in re.findall(r"(?:-m|--module) (tools\.\w+|megatron_kvpo[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for path in re.findall(r"\b((?:launch|examples|requirements)/[\w./]+\.\w+)", text):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for name in re.findall(r"--topology (\d\w+\.?\w*)", text):
        assert name in topology.names()


def test_options_that_the_preflight_table_names_are_its_own():
    text = (ROOT / "docs" / "operations.md").read_text().split("## What preflight looks at")[1]
    source = (ROOT / "tools" / "preflight.py").read_text()
    named = re.findall(r"`(--[\w-]+)`", text.split("## When it stops")[0])
    assert len(named) >= 4
    assert [name for name in named if f'"{name}"' not in source] == []


def test_the_image_copies_what_the_ignore_file_lets_in_and_holds_what_was_built_with_torch():
    docker = (ROOT / "Dockerfile").read_text()
    let_in = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE)
              for name in line.split()}  # fmt: skip
    assert copied == set(let_in)
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^ARG BASE=\S+:\d\d\.\d\d-py3$", docker, re.MULTILINE), "pin the image"
    assert docker.index("USER ${USER_ID}") < docker.index("CMD")
    asked = (ROOT / "requirements" / "gpu.txt").read_text()
    assert not re.search(r"^(torch|triton|transformer)[-=]", asked, re.MULTILINE)
