"""From a YAML file and dotted overrides to frozen dataclasses, and back. Names no setting."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

T = TypeVar("T")

_TYPE_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path",
}  # fmt: skip


class WithPresets:
    """A config whose key `preset` names a set of values; keys given beside it win."""

    __slots__ = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def expand(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Values with those of their preset filled in. ValueError for an unknown one."""
        name = values.get("preset")
        if name is None:
            return values
        if name not in cls.presets:
            raise ValueError(f"{where}preset is {name!r}: choose one of {list(cls.presets)}")
        return {**cls.presets[name], **values}


def from_mapping(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a config from parsed YAML. ValueError for a key no field bears or a wrong type."""
    if issubclass(cls, WithPresets):
        values = cls.expand(values, where)
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {where}{close[0]}?" if close else f"; known: {sorted(known)}"
            raise ValueError(f"unknown setting {path}{hint}")
        built[key] = _coerce(hints[key], value, path)
    return cls(**built)


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """Turn one YAML value into the type its field declares."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{path} is a section: give it keys, not {value!r}")
        return from_mapping(typing.cast("type[Any]", hint), value, f"{path}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{path} is {value!r}: choose one of {list(arguments)}")
        return value
    if origin is tuple:
        return _coerce_tuple(arguments, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path} is a table of names and values, not {value!r}")
        return {_coerce(arguments[0], k, path): _coerce(arguments[1], v, f"{path}.{k}")
                for k, v in value.items()}  # fmt: skip
    return _coerce_scalar(hint, value, path)


def _coerce_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    errors = []
    for candidate in arguments:
        if candidate is type(None):
            continue
        try:
            return _coerce(candidate, value, path)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors) or f"{path} may not be empty")


def _coerce_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{path} is a list, not {value!r}: write [{value}]")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_coerce(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise ValueError(f"{path} has {len(value)} entries: it takes {len(arguments)}")
    return tuple(
        _coerce(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True))
    )


def _coerce_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, bool):
        raise ValueError(f"{path} is {value!r}: it takes a whole number")
    if not isinstance(value, hint):
        raise ValueError(f"{path} is {value!r}: it takes {_TYPE_NAMES.get(hint, hint.__name__)}")
    return value


def merge_override(values: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` to a parsed YAML tree, in place. The value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    *sections, key = path.split(".")
    node = values
    for name in sections:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {name} is a value, not a section")
        node = child
    node[key] = yaml.safe_load(text)


def load(cls: type[T], path: str | Path, overrides: list[str] | None = None) -> T:
    """Read a recipe, apply the overrides in order, and check everything. ValueError if wrong."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no recipe at {file}: give the path of a YAML file, see examples/")
    values = yaml.safe_load(file.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold sections and keys, not a {type(values).__name__}")
    for override in overrides or []:
        merge_override(values, override)
    return from_mapping(cls, values)


def to_mapping(config: Any) -> Any:
    """The inverse of from_mapping: plain lists, strings and numbers, ready for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: to_mapping(value) for key, value in config.items()}
    if isinstance(config, tuple):
        return [to_mapping(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def dump(config: Any, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load` reads back unchanged."""
    path.write_text(yaml.safe_dump(to_mapping(config), sort_keys=False))
