"""Habits that a linter does not know: who prints, what is loaded, which numbers stand in code."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.sources import (
    PACKAGE,
    calls,
    dotted,
    package_files,
    repository_files,
    shipped_files,
    show,
    tree_of,
)

SHAPE_NUMBERS = {1560, 60, 104}
"""Sizes of a Wan latent frame at 480 x 832. They come from config, whatever the recipe."""

CLOCK_FILES = {"log.py", "parallel/groups.py", "training/metrics.py"}
"""Where 60 is the seconds of a minute. The other two numbers are refused there as well."""

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {
    "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
}  # fmt: skip

# Joined here so that this file does not hold what it forbids.
REGISTRY_HOSTS = re.compile(
    "|".join(
        (
            "py" + r"pi\.[a-z]", "python" + r"hosted\.", r"download\.py" + r"torch\.",
            "anacon" + r"da\.(org|com)", "conda-" + r"forge\.", "registry" + r"\.npm",
        )
    ).encode()
)  # fmt: skip


def prints(tree: ast.Module) -> Iterator[ast.AST]:
    for name, node in calls(tree):
        if name == "print" or name.endswith(("stdout.write", "stderr.write", "stdout.writelines")):
            yield node


def blind_excepts(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {dotted(kind).split(".")[-1] if kind else "" for kind in kinds}
            if names & {"", "Exception", "BaseException"}:
                yield node


def config_getattrs(tree: ast.Module) -> Iterator[ast.AST]:
    for name, node in calls(tree):
        if name in ("getattr", "hasattr") and node.args:
            owner = dotted(node.args[0]).split(".")[-1].lower()
            if owner.endswith(("config", "cfg")):
                yield node


def unsafe_loads(tree: ast.Module) -> Iterator[ast.AST]:
    """Whatever could run code hidden in a file: unpickling, eval, a shell."""
    from_torch = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name == "load"
    }
    for name, call in calls(tree):
        flags = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        is_torch_load = name == "torch.load" or name in from_torch
        unpickles = is_torch_load and flags.get("weights_only") is not True
        if unpickles or name in UNSAFE_CALLS or flags.get("shell") or flags.get("allow_pickle"):
            yield call
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not all(a.name[-5:] == "Error" for a in node.names):
            modules = [node.module or ""]  # an error's name can be caught, not called to load
        if {module.split(".")[0] for module in modules} & UNSAFE_MODULES:
            yield node


def shape_literals(tree: ast.Module, allowed: set[int]) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        number = node.value if isinstance(node, ast.Constant) else None
        if type(number) is int and number in SHAPE_NUMBERS - allowed:
            yield node


def found(rule: Callable[[ast.Module], Iterator[ast.AST]], files: list[Path]) -> list[str]:
    return [show(file, node) for file in files for node in rule(tree_of(file))]


def without(*names: str) -> list[Path]:
    return [f for f in package_files() if f.relative_to(PACKAGE).as_posix() not in names]


def test_only_the_log_prints() -> None:
    assert not found(prints, without("log.py")), "write through megatron_kvpo.log"


def test_no_except_is_blind() -> None:
    assert not found(blind_excepts, shipped_files()), "name the errors that are expected"


def test_settings_are_read_by_name() -> None:
    # settings.py walks the fields of any config, so it alone asks by string.
    assert not found(config_getattrs, without("settings.py")), "write config.section.field"


def test_nothing_loads_code_from_files() -> None:
    assert not found(unsafe_loads, shipped_files()), (
        "use safetensors, JSON, yaml.safe_load, or torch.load(..., weights_only=True)"
    )


def test_no_module_assumes_the_size_of_a_latent_frame() -> None:
    places = [
        show(file, node)
        for file in without("method_config.py")
        for node in shape_literals(
            tree_of(file), {60} if file.relative_to(PACKAGE).as_posix() in CLOCK_FILES else set()
        )
    ]
    assert not places, f"{sorted(SHAPE_NUMBERS)} come from ModelConfig: {places}"


def test_no_file_names_a_package_registry() -> None:
    files = repository_files()
    if not files:
        pytest.skip("not a git checkout")
    places = [show(file) for file in files if REGISTRY_HOSTS.search(file.read_bytes())]
    assert not places, f"an address of a package registry stands in {places}"


BAD = [
    (prints, "print(1)"),
    (prints, "import sys\nsys.stderr.write('x')"),
    (blind_excepts, "try:\n    pass\nexcept:\n    pass"),
    (blind_excepts, "try:\n    pass\nexcept (OSError, Exception):\n    pass"),
    (config_getattrs, "getattr(self.config, 'lr', 1)"),
    (unsafe_loads, "import torch\ntorch.load(p)"),
    (unsafe_loads, "import torch\ntorch.load(p, weights_only=False)"),
    (unsafe_loads, "from torch import load as take\ntake(p)"),
    (unsafe_loads, "from pickle import loads"),
    (unsafe_loads, "from pickle import UnpicklingError, Unpickler"),
    (unsafe_loads, "import pickle"),
    (unsafe_loads, "import numpy\nnumpy.load(p, allow_pickle=True)"),
    (unsafe_loads, "eval('1')"),
    (unsafe_loads, "subprocess.run('x', shell=True)"),
]

GOOD = [
    (prints, "log.info('x')"),
    (blind_excepts, "try:\n    pass\nexcept (OSError, ValueError):\n    pass"),
    (config_getattrs, "getattr(module, 'weight')"),
    (unsafe_loads, "import torch\ntorch.load(p, weights_only=True)"),
    (unsafe_loads, "from pickle import UnpicklingError"),
    (unsafe_loads, "model.eval()\njson.load(f)\nyaml.safe_load(f)"),
]


@pytest.mark.parametrize(("rule", "source"), BAD)
def test_a_breach_is_seen(rule: Callable[[ast.Module], Iterator[ast.AST]], source: str) -> None:
    assert list(rule(ast.parse(source)))


@pytest.mark.parametrize(("rule", "source"), GOOD)
def test_what_is_right_passes(rule: Callable[[ast.Module], Iterator[ast.AST]], source: str) -> None:
    assert not list(rule(ast.parse(source)))


def test_shape_literals_are_seen() -> None:
    assert len(list(shape_literals(ast.parse("a = 1560 * 2 + 104 - 60"), set()))) == 3
    assert not list(shape_literals(ast.parse("divmod(s, 60), 1.04, '104'"), {60}))


def test_registry_hosts_are_seen() -> None:
    assert REGISTRY_HOSTS.search(b"https://py" + b"pi.org/simple")
    assert not REGISTRY_HOSTS.search(b"see https://arxiv.org/abs/2605.14278 and pip install")
