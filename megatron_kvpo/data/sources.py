"""Where videos and their captions stand: folders, JSONL and CSV manifests, WebDataset shards."""

from __future__ import annotations

import csv
import glob
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Unit = Literal["s", "pixel_frame", "latent_frame"]

MANIFESTS = ("manifest.jsonl", "manifest.csv")
SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv",
    ".flv", ".ogv", ".3gp", ".mxf",
})  # fmt: skip
"""Files of a folder or of a shard that are taken for videos."""

UNITS: tuple[Unit, ...] = ("s", "pixel_frame", "latent_frame")
EXAMPLE = '{"file": "a.mp4", "segments": [{"text": "a cat", "start_s": 0}, ...]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSource:
    """Videos on disk and how they are checked: settings."""

    path: Path
    """A folder (its manifest.jsonl or .csv, else its .tar shards, else every video below it), a
    manifest, a shard, or a pattern of shards: `*`, `?`, `[...]` and `{0000..0041}`."""

    max_bad: float = 0.1
    """Share of files that may be unusable before the run stops."""

    check: Literal["decode", "packets"] = "decode"
    """What the probe does with a file that it has not seen: decode all of it, or count its packets
    and decode one pixel frame. `packets` is fast; what is damaged inside shows when it is used."""

    cache: Path | None = None
    """Folder of .probe.jsonl and skipped.jsonl. None: beside the data."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad {self.max_bad} is a share of the files: 0 to 1")
        if self.check not in ("decode", "packets"):
            raise ValueError(f"check is {self.check!r}: choose 'decode' or 'packets'")

    @property
    def folder(self) -> Path:
        """Where the probe's cache and the report of skipped files go."""
        if self.cache is not None:
            return self.cache
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def report_path(self) -> Path:
        """JSON lines of `file` and `reason`, one for each file that was skipped."""
        own = self.path.suffix in (".jsonl", ".csv") and self.path.name not in MANIFESTS
        return self.folder / (f"skipped.{self.path.stem}.jsonl" if own else "skipped.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A text and where in its file it begins."""

    text: str
    start: float = 0
    unit: Unit = "s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A video that a source names, not opened yet."""

    index: int
    """Its place in the source, from 0."""

    name: str
    """As the source writes it: what reports say."""

    path: Path
    segments: tuple[Segment, ...] = ()
    offset: int = 0
    """First byte within `path`, for a member of a shard."""

    size: int | None = None
    """Bytes; None for a whole file."""


def read_entries(source: VideoSource) -> list[Entry]:
    """Every video of a source, in order. ValueError for a missing or ill-formed one."""
    path = source.path
    if path.is_dir():
        return _of_folder(path)
    if path.suffix in (".jsonl", ".csv"):
        return _of_manifest(path)
    if path.suffix == ".tar":
        shards = [Path(found) for p in _braces(str(path)) for found in sorted(glob.glob(p))]
        if shards:
            return _of_shards(shards, path.parent)
    raise ValueError(
        f"no videos at {path}: give a folder, a .jsonl or .csv manifest, or .tar shards"
    )


def _of_folder(folder: Path) -> list[Entry]:
    for name in MANIFESTS:
        if (folder / name).is_file():
            return _of_manifest(folder / name)
    if shards := sorted(folder.glob("*.tar")):
        return _of_shards(shards, folder)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    videos = [name for name, path in files.items() if path.suffix.lower() in SUFFIXES]
    if not videos:
        raise ValueError(
            f"no manifest at {folder / MANIFESTS[0]}, no .tar shard and no video file in {folder}: "
            f"write one JSON object a line, as {EXAMPLE}"
        )
    return [
        Entry(index=index, name=name, path=files[name], segments=_beside(files, Path(name)))
        for index, name in enumerate(videos)
    ]


def _beside(files: dict[str, Path], video: Path) -> tuple[Segment, ...]:
    """The caption of a .txt or .json file of the same name."""
    for suffix in (".json", ".txt"):
        file = files.get(video.with_suffix(suffix).as_posix())
        if file is not None:
            return _caption(file.read_bytes(), suffix, str(file))
    return ()


def _caption(data: bytes, suffix: str, where: str) -> tuple[Segment, ...]:
    try:
        text = data.decode()
        if suffix == ".txt":
            return (Segment(text=text.strip()),)
        return _segments(json.loads(text), where)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is not {suffix[1:]} in UTF-8 ({error})") from error


def _of_manifest(path: Path) -> list[Entry]:
    if not path.is_file():
        raise ValueError(f"no manifest at {path}: write one JSON object a line, as {EXAMPLE}")
    rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
    return [
        Entry(index=index, name=row["file"], path=path.parent / row["file"],
              segments=_segments(row, where))
        for index, (where, row) in enumerate(rows)
    ]  # fmt: skip


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("file"), str):
            raise ValueError(f"{where}: {line[:80]!r} is no JSON object with a key 'file'")
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Consecutive rows of one file are its segments."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "file" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} line 1: the columns are {reader.fieldnames}, without 'file'")
        rows = [(reader.line_num, row) for row in reader]
    for name, group in itertools.groupby(rows, key=lambda row: row[1]["file"]):
        lines = list(group)
        where = f"{path} line {lines[0][0]}"
        if not name:
            raise ValueError(f"{where}: no file is named")
        cleaned = [{k: v for k, v in row.items() if k and v} for _, row in lines]
        if len(cleaned) == 1 and not any(f"start_{unit}" in cleaned[0] for unit in UNITS):
            yield where, cleaned[0]
        else:
            yield where, {"file": name, "segments": [_csv_segment(row) for row in cleaned]}


def _csv_segment(row: dict[str, str]) -> dict[str, Any]:
    return {**row, "text": row.get("text", row.get("caption"))}


def _segments(row: dict[str, Any], where: str) -> tuple[Segment, ...]:
    """The captions of one manifest line, of one CSV file, or of one JSON file of a shard."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {str(row)[:80]!r} is no JSON object: write {EXAMPLE}")
    texts = row.get("segments")
    if texts is None:
        text = row.get("caption", row.get("text"))
        if text is None:
            return ()
        texts = [text]
    if not isinstance(texts, list):
        raise ValueError(f"{where}: 'segments' is {texts!r}, not a list: write {EXAMPLE}")
    if all(isinstance(text, str) for text in texts):
        starts, unit = _switches(row, len(texts), where)
        found = tuple(
            Segment(text=text, start=start, unit=unit)
            for text, start in zip(texts, starts, strict=True)
        )
    else:
        found = tuple(_segment(item, where) for item in texts)
    for unit in UNITS:
        starts = [segment.start for segment in found if segment.unit == unit]
        if any(a >= b for a, b in itertools.pairwise(starts)) or min(starts, default=0) < 0:
            raise ValueError(f"{where}: segments begin at {starts}: these must rise from 0 on")
    return found


def _switches(row: dict[str, Any], count: int, where: str) -> tuple[list[float], Unit]:
    names: dict[str, Unit] = {"switch_frames": "latent_frame", "switch_latent_frames":
                              "latent_frame", "switch_pixel_frames": "pixel_frame",
                              "switch_s": "s"}  # fmt: skip
    given = next((name for name in names if name in row), "switch_frames")
    switches = row.get(given, [])
    if not isinstance(switches, list) or not all(
        isinstance(n, int | float) and not isinstance(n, bool) for n in switches
    ):
        raise ValueError(f"{where}: {given!r} is {switches!r}, not a list of numbers")
    if len(switches) != max(count - 1, 0):
        raise ValueError(
            f"{where}: {count} segments need {max(count - 1, 0)} numbers in {given!r}, "
            f"not {len(switches)}"
        )
    return [0.0, *map(float, switches)][:count], names[given] if switches else "s"


def _segment(item: Any, where: str) -> Segment:
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise ValueError(f"{where}: segment {item!r} has no 'text': write {EXAMPLE}")
    units = [unit for unit in UNITS if f"start_{unit}" in item]
    if len(units) > 1:
        raise ValueError(f"{where}: segment {item!r} begins twice: give one of {units}")
    unit: Unit = units[0] if units else "s"
    try:
        return Segment(text=item["text"], start=float(item.get(f"start_{unit}", 0)), unit=unit)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: segment {item!r} begins at no number") from error


def _braces(pattern: str) -> list[str]:
    """`a{01..03}.tar` -> a01.tar, a02.tar, a03.tar; zeros in front are kept."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    return [
        whole
        for number in range(int(first), int(last) + 1)
        for whole in _braces(
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        )
    ]


def _of_shards(shards: Sequence[Path], folder: Path) -> list[Entry]:
    """Videos of tar files with the captions of their .json or .txt neighbours, nothing unpacked."""
    entries: list[Entry] = []
    for shard in shards:
        members = _members(shard)
        shown = shard.relative_to(folder) if shard.is_relative_to(folder) else shard
        for (key, suffix), (offset, size) in members.items():
            if suffix not in SUFFIXES:
                continue
            segments: tuple[Segment, ...] = ()
            for other in (".json", ".txt"):
                if not segments and (key, other) in members:
                    with shard.open("rb") as file:
                        file.seek(members[key, other][0])
                        data = file.read(members[key, other][1])
                    segments = _caption(data, other, f"{shard}/{key}{other}")
            entries.append(Entry(index=len(entries), name=f"{shown}/{key}{suffix}", path=shard,
                                 segments=segments, offset=offset, size=size))  # fmt: skip
    if not entries:
        raise ValueError(f"no video in {len(shards)} shards, the first is {shards[0]}")
    return entries


def _members(shard: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(name up to its first dot, last suffix) -> first byte and size of each file of a shard.

    Members whose end the file does not reach are named all the same: the probe rejects them.
    """
    found: dict[tuple[str, str], tuple[int, int]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    folder, _, name = member.name.rpartition("/")
                    key = f"{folder}/{name.split('.')[0]}" if folder else name.split(".")[0]
                    found[key, Path(name).suffix.lower()] = member.offset_data, member.size
    except (tarfile.TarError, EOFError) as error:
        if not found:
            raise ValueError(f"{shard} is no uncompressed tar file ({error})") from error
    return found
