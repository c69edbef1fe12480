from __future__ import annotations

import hashlib

import pytest
import torch

from megatron_kvpo.parallel.seeds import generator, noise


def test_equal_coordinates_give_equal_noise_and_any_other_coordinate_another():
    first = noise((2, 3, 4), 42, "clean", 7)
    assert torch.equal(first, noise((2, 3, 4), 42, "clean", 7))
    for other in [(42, "clean", 8), (43, "clean", 7), (42, "state", 7), (42, "clean"), (42, 7)]:
        assert not torch.equal(first, noise((2, 3, 4), *other)), other


@pytest.mark.parametrize(
    ("one", "two"),
    [((1, 23), (12, 3)), (("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((1, 2), ("1i1:2",)),
     (("",), ("", "")), ((-1,), ("-1",)), ((1, 2), (2, 1))],
)  # fmt: skip
def test_coordinates_are_not_glued_together(one, two):
    assert generator(*one).initial_seed() != generator(*two).initial_seed()


def test_noise_is_standard_normal_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        drawn = noise((100_000,), "moments")
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32
    assert drawn.mean().abs() < 0.02
    assert (drawn.std() - 1).abs() < 0.02


def test_noise_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = noise((8,), 1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, noise((8,), 1))


def test_noises_of_neighbouring_coordinates_are_independent():
    drawn = torch.stack([noise((4096,), 0, i) for i in range(16)])
    correlation = torch.corrcoef(drawn) - torch.eye(16)
    assert correlation.abs().max() < 0.1


def test_noise_without_coordinates_or_with_a_float_or_flag_is_refused():
    with pytest.raises(ValueError, match="0 coordinates"):
        noise((1,))
    for wrong in (1.0, True, None):
        with pytest.raises(ValueError, match="use whole numbers and strings"):
            noise((1,), 1, wrong)


def test_golden_seed_of_one_coordinate():
    """Type and length before each value. Another derivation would break every resumed run."""
    digest = hashlib.blake2b(b"i2:42s5:blocki1:3", digest_size=8).digest()
    assert generator(42, "block", 3).initial_seed() == int.from_bytes(digest, "little")
    assert generator(42, "block", 3).initial_seed() == 4204436939912580804
