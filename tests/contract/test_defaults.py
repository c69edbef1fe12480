"""The defaults are pinned, and every recipe in examples/ means what it says."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_kvpo import settings
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.method_config import BACKBONES
from tests.contract.sources import ROOT

GOLDEN = ROOT / "tests" / "golden" / "default_config.yaml"

RECIPES: tuple[tuple[str, str, str], ...] = (
    ("examples/*/pretrain*.yaml", "megatron_kvpo.training.pretrain", "PretrainConfig"),
    ("examples/*/few_step*.yaml", "megatron_kvpo.training.pretrain", "PretrainConfig"),
    ("examples/**/*.yaml", "megatron_kvpo.config", "RunConfig"),
)
"""Glob from the root, module and class that reads the recipe. The first that matches counts."""


def recipes() -> dict[Path, tuple[str, str]]:
    """Every recipe of the repository and the class that reads it."""
    table: dict[Path, tuple[str, str]] = {}
    for pattern, module, name in RECIPES:
        for file in sorted(ROOT.glob(pattern)):
            table.setdefault(file, (module, name))
    return table


def each_recipe() -> list[Any]:
    """One test parameter a recipe, or a single skipped one while there is none."""
    parameters = [
        pytest.param(file, *reader, id=file.relative_to(ROOT).as_posix())
        for file, reader in recipes().items()
    ]
    none_yet = pytest.param(None, "", "", marks=pytest.mark.skip(reason="no recipe in examples/"))
    return parameters or [none_yet]


def reader_of(module: str, name: str) -> type[Any]:
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def expected(default: Any, written: Any) -> Any:
    """The defaults with what a recipe writes laid over them, section by section."""
    if not dataclasses.is_dataclass(default):
        return written
    values = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    return {
        key: expected(value, written[key]) if key in written else settings.to_mapping(value)
        for key, value in values.items()
    }


def plain(value: Any) -> Any:
    """Numbers by value: YAML 1.1 reads 1e-3 as text, and 1 and 1.0 are one number."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_the_defaults_are_the_committed_ones(tmp_path: Path) -> None:
    settings.dump(RunConfig(), tmp_path / "now.yaml")
    assert (tmp_path / "now.yaml").read_text() == GOLDEN.read_text(), (
        "a default has changed: if that is meant, write the file anew with settings.dump("
        "RunConfig(), ...) and say so under Numerics in CHANGELOG.md"
    )


def test_the_committed_defaults_load_back_unchanged() -> None:
    assert load_config(GOLDEN) == RunConfig()


def test_an_override_beats_the_file_and_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 1\noptimizer: {lr: 1e-3, beta1: 0.5}\n")
    config = load_config(file, ["optimizer.lr=0", "seed=3", "seed=4"])
    assert (config.seed, config.optimizer.lr, config.optimizer.beta1) == (4, 0.0, 0.5)
    assert config.optimizer.beta2 == RunConfig().optimizer.beta2


@pytest.mark.parametrize(("file", "module", "name"), each_recipe())
def test_a_recipe_changes_what_it_writes_and_nothing_else(
    file: Path, module: str, name: str
) -> None:
    reader = reader_of(module, name)
    written = yaml.safe_load(file.read_text()) or {}
    model = written.get("model", {})
    if "preset" in model:
        written["model"] = {**BACKBONES[model["preset"]], **model}
    loaded = settings.to_mapping(settings.load(reader, file))
    assert plain(loaded) == plain(expected(reader(), written))


@pytest.mark.parametrize(("file", "module", "name"), each_recipe())
def test_what_a_recipe_resolves_to_loads_back_unchanged(
    file: Path, module: str, name: str, tmp_path: Path
) -> None:
    reader = reader_of(module, name)
    config = settings.load(reader, file)
    settings.dump(config, tmp_path / "config.yaml")
    assert settings.load(reader, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "file",
    [p for p, (_, name) in recipes().items() if p.parent.name == "shapes" and name == "RunConfig"],
)
def test_a_shapes_recipe_needs_no_file_that_git_leaves_out(file: Path) -> None:
    config = load_config(file)
    inputs = [config.data.prompts, config.evaluation.prompts, config.model.weights,
              config.codec.weights, config.policy.adapter]  # fmt: skip
    needed = [path for path in inputs if path is not None]
    missing = [str(path) for path in needed if not (ROOT / path).is_file()]
    assert not missing, f"{file.name} names {missing}, which a fresh clone does not have"
    if (ROOT / ".git").exists():
        asked = ["git", "check-ignore", "--", *map(str, needed)]
        ignored = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
        assert not ignored.stdout, f"{file.name} needs what .gitignore leaves out: {ignored.stdout}"
