"""Wan's frozen text encoder, umT5, through transformers.

Local folders only, safetensors or `torch.load(weights_only=True)` only: nothing is downloaded and
no file can run code. transformers is imported when an encoder is loaded, not before.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.model.frozen import fill, indexed_files, read_pickle, read_safetensors, resident

logger = log.get_logger(__name__)

ORIGINAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_TOKENIZER = "google/umt5-xxl"
"""Where Wan's own release keeps the weights and the tokenizer."""

EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")
"""Two names of one tensor; a file may hold either or both."""

OUTER_NAMES = {
    "token_embedding.weight": EMBEDDING_NAMES[0],
    "norm.weight": "encoder.final_layer_norm.weight",
}
BLOCK_NAMES = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
"""`blocks.i.<ours>` in Wan's file is `encoder.block.i.<theirs>` in transformers."""

_SHOWN_CHARACTERS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderFiles:
    """What an encoder is loaded from."""

    weights: tuple[Path, ...]
    """Safetensors shards, or Wan's one `.pth`."""

    config: Path | None
    """transformers' config.json; None for Wan's `.pth`, whose sizes stand in its tensors."""

    tokenizer: Path

    @classmethod
    def find(cls, folder: Path) -> EncoderFiles:
        """Recognise Wan's own folder, its diffusers folder, or a plain transformers folder.

        Raises ValueError for a folder that is none of these or lacks a file, naming it.
        """
        if not folder.is_dir():
            raise ValueError(f"no folder at {folder}: give the folder of a umT5 encoder")
        original, config = folder / ORIGINAL_FILE, folder / "config.json"
        if original.is_file():
            tokenizer = _tokenizer_folder(folder / ORIGINAL_TOKENIZER)
            return cls(weights=(original,), config=None, tokenizer=tokenizer)
        tokenizer = folder
        if (folder / "text_encoder" / "config.json").is_file():
            config, tokenizer = folder / "text_encoder" / "config.json", folder / "tokenizer"
        if not config.is_file():
            raise ValueError(
                f"{folder} holds no umT5: it needs {ORIGINAL_FILE} and {ORIGINAL_TOKENIZER}/, or "
                "text_encoder/ and tokenizer/, or config.json with weights and tokenizer"
            )
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        if kind != "umt5":
            raise ValueError(f"{config} is of model_type {kind!r}: umt5 is needed")
        weights = _shards(config.parent)
        return cls(weights=weights, config=config, tokenizer=_tokenizer_folder(tokenizer))

    def identity(self) -> str:
        """Sixteen hex digits of the config and of each weight and tokenizer file's name and size.

        The same files in another folder are the same encoder. No weight is read.
        """
        digest = hashlib.sha256()
        if self.config is not None:
            digest.update(self.config.read_bytes())
        files = [f for f in sorted(self.tokenizer.iterdir()) if f.is_file()]
        names = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
        for file in (*self.weights, *(f for f in files if f.name in names)):
            digest.update(f"\n{file.name} {file.stat().st_size}".encode())
        return digest.hexdigest()[:16]


def _shards(folder: Path) -> tuple[Path, ...]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    paths = indexed_files(index) if index.is_file() else (single,)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(paths)} weight files, the first is "
            f"{missing[0]}: only safetensors are read"
        )
    return paths


def _tokenizer_folder(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ValueError(f"no tokenizer at {folder}: tokenizer.json or spiece.model is needed")
    return folder


def clean_text(text: str) -> str:
    """Wan's cleaning: HTML entities resolved twice, white space collapsed and stripped."""
    return " ".join(html.unescape(html.unescape(text)).split())


def padded(tokens: Sequence[Tensor], text_length: int, text_dim: int) -> Tensor:
    """Embeddings [tokens, D] of some texts as one float32 `text_BXD`, zeros past each end."""
    text_BXD = torch.zeros(len(tokens), text_length, text_dim)
    for row, tokens_XD in enumerate(tokens):
        text_BXD[row, : len(tokens_XD)] = tokens_XD.float()
    return text_BXD


class UMT5Encoder:
    """Texts to `text_BXD`, with zeros past a text's end. Frozen; on the CPU while idle."""

    def __init__(
        self, model: Any, tokenizer: Any, identity: str, *, text_length: int = 512,
        device: torch.device | str = "cpu", strict: bool = False,
    ) -> None:  # fmt: skip
        """Wrap a transformers UMT5EncoderModel and its tokenizer; `load_umt5` builds both.

        `device` is where the model computes. ValueError if the tokenizer is of another model.
        """
        if text_length < 2:
            raise ValueError(f"text_length {text_length} must be at least 2, a token and its end")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer knows {len(tokenizer)} tokens, the model {model.config.vocab_size}"
                ": they do not belong together"
            )
        self.identity = identity
        self.text_length = text_length
        self.text_dim: int = model.config.d_model
        self.dtype: torch.dtype = model.dtype
        self._model, self._tokenizer = model, tokenizer
        self._device, self._strict = torch.device(device), strict

    def resident(self) -> AbstractContextManager[None]:
        """Keep the weights on the encoder's device across several calls."""
        return resident(self._model, self._device)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`text_BXD`, float32 on the CPU, zeros past each text's end.

        A text of more than text_length tokens is cut with a warning, or ValueError if strict.
        """
        return padded(self.embed(texts), self.text_length, self.text_dim)

    @torch.no_grad()
    def require(self, texts: Sequence[str]) -> None:
        """Any text can be encoded."""

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """[tokens, D] of each text, unpadded, in the model's dtype on the CPU.

        The texts run as one batch, padded to the longest and masked: what stands beside a text
        moves its embedding by rounding only.
        """
        rows = [self.token_ids(text) for text in texts]
        if not rows:
            return []
        ids_BX = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask_BX = torch.zeros_like(ids_BX)
        for row, ids in enumerate(rows):
            ids_BX[row, : len(ids)] = torch.tensor(ids)
            mask_BX[row, : len(ids)] = 1
        with self.resident():
            output = self._model(
                input_ids=ids_BX.to(self._device), attention_mask=mask_BX.to(self._device)
            )
            hidden_BXD: Tensor = output.last_hidden_state.cpu()
        return [hidden_BXD[row, : len(ids)].clone() for row, ids in enumerate(rows)]

    def token_ids(self, text: str) -> list[int]:
        """Tokens of the cleaned text and the end token, at most text_length of them."""
        clean = clean_text(text)
        ids: list[int] = self._tokenizer(clean, truncation=False, verbose=False)["input_ids"]
        if len(ids) > self.text_length:
            shown = f"{clean[:_SHOWN_CHARACTERS]}..."
            message = f"{len(ids)} tokens in {shown!r} exceed text_length {self.text_length}"
            if self._strict:
                raise ValueError(f"{message}: shorten the text, or let it be cut (strict off)")
            logger.warning("%s: the last %d are cut", message, len(ids) - self.text_length)
            ids = self._tokenizer(clean, truncation=True, max_length=self.text_length)["input_ids"]
        return ids


def load_umt5(
    folder: Path, *, text_length: int = 512, dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu", strict: bool = False,
) -> UMT5Encoder:  # fmt: skip
    """Load an encoder from a local folder, see `EncoderFiles.find`; it computes on `device`.

    Raises ValueError for missing files, unsafe pickles, and missing, extra or misshapen tensors.
    """
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    files = EncoderFiles.find(folder)
    if files.config is None:
        state = rename_original(read_pickle(files.weights[0]), files.weights[0])
        config = UMT5Config(**original_sizes(state))
        tensors: Iterable[tuple[str, Tensor]] = state.items()
    else:
        config = UMT5Config.from_pretrained(str(files.config.parent), local_files_only=True)
        tensors = read_safetensors(files.weights)
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    model.set_input_embeddings(model.shared)
    fill(model, _encoder_only(tensors), dtype, files.weights[0].parent)
    tokenizer = AutoTokenizer.from_pretrained(str(files.tokenizer), local_files_only=True)
    return UMT5Encoder(
        model, tokenizer, files.identity(), text_length=text_length, device=device, strict=strict
    )


def _encoder_only(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Leave out the decoder of a full checkpoint; give the embedding both of its names."""
    embedding: Tensor | None = None
    for name, tensor in tensors:
        if name.startswith("decoder.") or name == "lm_head.weight":
            continue
        if name not in EMBEDDING_NAMES:
            yield name, tensor
        elif embedding is None:
            embedding = tensor
        elif not torch.equal(embedding, tensor):
            raise ValueError(f"{' and '.join(EMBEDDING_NAMES)} differ: umT5 has one embedding")
    if embedding is not None:
        yield from ((name, embedding) for name in EMBEDDING_NAMES)


def rename_original(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Wan's names to transformers', by the two tables. ValueError with the unknown names."""
    renamed, unknown = {}, []
    for name, tensor in state.items():
        head, _, tail = name.partition(".")
        number, _, inner = tail.partition(".")
        if name in OUTER_NAMES:
            renamed[OUTER_NAMES[name]] = tensor
        elif head == "blocks" and number.isdigit() and inner in BLOCK_NAMES:
            renamed[f"encoder.block.{number}.{BLOCK_NAMES[inner]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{source} is not Wan's umT5 encoder: {len(unknown)} unknown tensors "
            f"{sorted(unknown)[:3]}"
        )
    return renamed


def original_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """UMT5Config's sizes, read from renamed tensors. ValueError if the first block is not there."""
    block = "encoder.block.0.layer."
    try:
        vocab_size, d_model = state[EMBEDDING_NAMES[0]].shape
        num_buckets, num_heads = state[
            f"{block}0.SelfAttention.relative_attention_bias.weight"
        ].shape
        d_ff = state[f"{block}1.DenseReluDense.wi_0.weight"].shape[0]
        d_kv = state[f"{block}0.SelfAttention.q.weight"].shape[0] // num_heads
    except KeyError as error:
        raise ValueError(f"no size of umT5 can be read: {error.args[0]} is missing") from error
    num_layers = 1 + max(int(name.split(".")[2]) for name in state if ".block." in name)
    return {
        "vocab_size": vocab_size, "d_model": d_model, "d_ff": d_ff, "d_kv": d_kv,
        "num_heads": num_heads, "num_layers": num_layers,
        "relative_attention_num_buckets": num_buckets,
    }  # fmt: skip
