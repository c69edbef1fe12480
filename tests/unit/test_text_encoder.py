"""The fixed text encoder."""

import pytest
import torch

from megatron_kvpo.model.text_encoder import WordEncoder
from megatron_kvpo.world import WORDS

VOCABULARY = ["a", "red", "blue", "square", "circle", "moves", "right"]


def test_same_text_gives_the_same_bits_in_any_encoder():
    one = WordEncoder(32, 8, VOCABULARY).encode(["a red square moves right"])
    two = WordEncoder(32, 8, [*reversed(VOCABULARY), "green"]).encode(
        ["A red square, moves right!"]
    )
    assert one.shape == (1, 8, 32)
    assert one.dtype == torch.float32
    assert torch.equal(one, two)


def test_zeros_past_the_end_and_nowhere_before():
    text = WordEncoder(32, 8, VOCABULARY).encode(["a red square", ""])
    assert (text[0, :3].abs().sum(-1) > 0).all()
    assert not text[0, 3:].any()
    assert not text[1].any()


def test_words_have_unit_variance_and_little_in_common():
    encoder = WordEncoder(256, 1, VOCABULARY)
    vectors = encoder.encode(VOCABULARY)[:, 0]
    assert 0.7 < vectors.var(dim=1).min() < vectors.var(dim=1).max() < 1.5
    cosine = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    assert (cosine - torch.eye(len(VOCABULARY))).abs().max() < 0.35


def test_order_shows_but_words_stay_recognisable():
    encoder = WordEncoder(256, 8, VOCABULARY)
    one, two = encoder.encode(["red square circle", "circle square red"])
    assert not torch.allclose(one.sum(0), two[:3].flip(0)[0])
    similar = torch.nn.functional.cosine_similarity(one[0], two[2], dim=0)
    assert 0.8 < similar < 0.999


def test_unknown_words_name_the_text_and_the_nearest_word():
    encoder = WordEncoder(32, 8, VOCABULARY)
    with pytest.raises(ValueError, match=r"'sqare' in 'a red sqare'; .* is 'square'"):
        encoder.encode(["a red square", "a red sqare"])


def test_too_many_words_name_the_text_and_both_numbers():
    with pytest.raises(ValueError, match=r"3 words in 'a red square' exceed model.text_length 2"):
        WordEncoder(32, 2, VOCABULARY).encode(["a red square"])


def test_the_world_speaks_by_default():
    encoder = WordEncoder(16, 24)
    assert encoder.encode([" ".join(list(WORDS)[:8])])[0, :8].abs().sum(-1).gt(0).all()
