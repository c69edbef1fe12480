"""Prompt embeddings on disk, so that training never loads the text encoder.

One safetensors file: a tensor [tokens, D] for each distinct text, without padding, under the hash
of (encoder, text), and a manifest that says which encoder made them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.model.umt5 import clean_text, padded

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_METADATA_KEY = "prompt_embeddings"


class Embedder(Protocol):
    """A text encoder that can fill a cache; UMT5Encoder is one."""

    identity: str
    text_length: int
    text_dim: int
    dtype: torch.dtype

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """[tokens, D] of each text, unpadded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What all embeddings of a file have in common."""

    encoder: str
    """Identity of the encoder: `EncoderFiles.identity()`."""

    dtype: str
    """Of the encoder and of the stored tensors, a key of DTYPES."""

    text_length: int
    """Tokens at which the encoder cut longer texts."""

    text_dim: int

    @classmethod
    def of(cls, encoder: Embedder) -> Manifest:
        """The manifest of what `encoder` writes. ValueError for a dtype that is not stored."""
        names = [name for name, dtype in DTYPES.items() if dtype == encoder.dtype]
        if not names:
            raise ValueError(f"embeddings are stored as {list(DTYPES)}, not as {encoder.dtype}")
        return cls(encoder=encoder.identity, dtype=names[0], text_length=encoder.text_length,
                   text_dim=encoder.text_dim)  # fmt: skip

    def check(self, path: Path, **wanted: str | int) -> None:
        """Raise ValueError if a field is not as `wanted`, naming both values."""
        wrong = [f"{name} {asdict(self)[name]}, not {value}" for name, value in wanted.items()
                 if asdict(self)[name] != value]  # fmt: skip
        if wrong:
            raise ValueError(
                f"{path} was made otherwise ({'; '.join(wrong)}): name another --output, or the "
                "encoder and options that made it"
            )


def text_key(encoder: str, text: str) -> str:
    """Name of a text's tensor: 32 hex digits of the encoder's identity and the cleaned text."""
    return hashlib.sha256(f"{encoder}\n{clean_text(text)}".encode()).hexdigest()[:32]


class EmbeddingCache:
    """Reads embeddings by text; a drop-in for the encoder that wrote them.

    The file is mapped, not read whole: ranks of one machine share its pages.
    """

    def __init__(self, path: Path, **expected: str | int) -> None:
        """Open a file. ValueError if there is none, it is no cache, or it was made otherwise.

        `expected` names fields of Manifest, such as encoder, text_dim or text_length.
        """
        if not path.is_file():
            raise ValueError(f"no prompt embeddings at {path}: {_remedy(path)}")
        self._file = _open(path)
        metadata = self._file.metadata() or {}
        if _METADATA_KEY not in metadata:
            raise ValueError(f"{path} holds no prompt embeddings: {_remedy(path)}")
        self.path = path
        self.manifest = Manifest(**json.loads(metadata[_METADATA_KEY]))
        self.manifest.check(path, **expected)
        self.text_dim, self.text_length = self.manifest.text_dim, self.manifest.text_length
        self._keys = frozenset(self._file.keys())

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text_key(self.manifest.encoder, text) in self._keys

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`text_BXD`, float32 on the CPU, zeros past each text's end.

        ValueError for a text that is not in the cache, naming it and the command that adds it.
        """
        self.require(texts)
        keys = [text_key(self.manifest.encoder, text) for text in texts]
        tokens = [self._file.get_tensor(key) for key in keys]
        return padded(tokens, self.text_length, self.text_dim)

    def require(self, texts: Sequence[str]) -> None:
        """Raise ValueError unless every text is there: to be asked before a run begins."""
        missing = [text for text in dict.fromkeys(texts) if text not in self]
        if missing:
            raise ValueError(
                f"{len(missing)} texts are not in {self.path}, the first is {missing[0]!r}: "
                f"{_remedy(self.path)}"
            )


def _open(path: Path) -> Any:
    """A handle on the mapped file; safetensors gives it no types."""
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _remedy(path: Path) -> str:
    return (
        f"python -m tools.encode_prompts --prompts FILE --encoder FOLDER --output {path} adds "
        "what is missing"
    )


def missing_texts(path: Path, texts: Sequence[str], **expected: str | int) -> list[str]:
    """Distinct texts that the file at `path` lacks, in order; all of them if there is no file.

    ValueError for a file that is no cache or was made otherwise, as in EmbeddingCache.
    """
    cache = EmbeddingCache(path, **expected) if path.exists() else None
    distinct: dict[str, str] = {}
    for text in texts:
        distinct.setdefault(clean_text(text), text)
    return [text for text in distinct.values() if cache is None or text not in cache]


def add_texts(
    path: Path, encoder: Embedder, texts: Sequence[str], *, batch: int = 8, save_every: int = 1024
) -> int:
    """Embed what is missing and write the file anew; the number of texts that were added.

    The file is replaced as a whole, every `save_every` texts, at the end, and when an error or
    Ctrl-C stops the work: what was done by then is kept and the next call goes on from there.
    """
    manifest = Manifest.of(encoder)
    missing = missing_texts(path, texts, **asdict(manifest))
    # Texts of one length waste no padding; the longest come first, so memory runs out early or
    # never.
    missing.sort(key=len, reverse=True)
    tensors = load_file(path) if path.exists() else {}
    done = saved = 0
    try:
        with log.Progress(len(missing), label="text") as progress:
            while done < len(missing):
                part = missing[done : done + batch]
                for text, tokens_XD in zip(part, encoder.embed(part), strict=True):
                    tensors[text_key(manifest.encoder, text)] = tokens_XD.cpu().contiguous()
                done += len(part)
                progress.update(done)
                if done - saved >= save_every:
                    _write(path, tensors, manifest)
                    saved = done
    finally:
        if done > saved:
            _write(path, tensors, manifest)
    return done


def _write(path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """Write a temporary file beside `path`, then put it in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(asdict(manifest))})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
