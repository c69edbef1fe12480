"""A fixed text encoder for the shapes world: one random vector a word, plus its position."""

from __future__ import annotations

import difflib
import hashlib
import string
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_kvpo.world import WORDS

POSITION_AMPLITUDE = 0.3
"""Of the position's sines and cosines, against words of unit variance: order shows, words rule."""


class WordEncoder:
    """Texts to `text_BXD`, with zeros past a text's end (the umT5 convention of Wan).

    A word's vector is drawn by a generator seeded with its bytes, so it depends neither on the
    vocabulary nor on its order. Nothing is learned and nothing is stored.
    """

    def __init__(self, text_dim: int, text_length: int, vocabulary: Iterable[str] = WORDS) -> None:
        if text_dim < 1 or text_length < 1:
            raise ValueError(f"text_dim {text_dim} and text_length {text_length} must be above 0")
        self.text_dim = text_dim
        self.text_length = text_length
        self._vectors = {word: _word_vector(word, text_dim) for word in vocabulary}
        self._position_XD = POSITION_AMPLITUDE * _sinusoid(text_length, text_dim)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """`text_BXD`, float32 on the CPU; an empty text is all zeros.

        Raises ValueError with the text for an unknown word (and the nearest known one), or for
        more than text_length words.
        """
        text_BXD = torch.zeros(len(texts), self.text_length, self.text_dim)
        for row, text in enumerate(texts):
            words = self.words_of(text)
            if words:
                vectors = torch.stack([self._vectors[word] for word in words])
                text_BXD[row, : len(words)] = vectors + self._position_XD[: len(words)]
        return text_BXD

    def require(self, texts: Sequence[str]) -> None:
        """Raise ValueError as `encode` would, before a run begins."""
        for text in texts:
            self.words_of(text)

    def words_of(self, text: str) -> list[str]:
        """Lower-case words without punctuation, each known, at most text_length of them."""
        words = [word.strip(string.punctuation) for word in text.lower().split()]
        words = [word for word in words if word]
        for word in words:
            if word not in self._vectors:
                close = difflib.get_close_matches(word, self._vectors, n=1, cutoff=0.0)
                hint = f"; the nearest known word is {close[0]!r}" if close else ""
                raise ValueError(f"unknown word {word!r} in {text!r}{hint}")
        if len(words) > self.text_length:
            raise ValueError(
                f"{len(words)} words in {text!r} exceed model.text_length {self.text_length}: "
                "shorten the text or raise it"
            )
        return words


def _word_vector(word: str, text_dim: int) -> Tensor:
    """[D], normal with unit variance, float32."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(text_dim)).float()


def _sinusoid(length: int, dim: int) -> Tensor:
    """[X, D]: cosines of falling frequency, then sines."""
    half = (dim + 1) // 2
    frequency = torch.pow(1000.0, -torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)[:, :dim].float()
