"""Attention over what is seen equals masked attention, and nothing that is not seen leaks in."""

from __future__ import annotations

import functools
import importlib.util
import os

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_kvpo.config import StreamConfig
from megatron_kvpo.model import held as holding
from megatron_kvpo.model import sight as module
from megatron_kvpo.model.held import ATTENTION, Held
from megatron_kvpo.model.sdpa import kernel_for
from megatron_kvpo.model.sight import (
    Piece,
    Sight,
    Sums,
    attend_seen,
    batches,
    diffusion_sight,
    places,
    seen_by,
    teacher_frames,
    teacher_sight,
)
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.routing import plain_context

TOKENS = 4
STREAM = StreamConfig(num_frames=27, resident_frames=27)
SIGHTS = {"teacher": teacher_sight(STREAM, TOKENS), "diffusion": diffusion_sight(STREAM, TOKENS)}
HEADS = 2, 16

ODD = {
    "ragged": Sight((  # 2 and 9 are seen by nobody, 1 in every batch
        Piece((0, 5), ((0, 2), (3, 5))), Piece((5, 9), ((1, 2), (6, 9))),
        Piece((9, 12), ((1, 2), (5, 6), (10, 12))), Piece((12, 13), ((1, 2), (12, 13))),
    )),
    "one batch": Sight((Piece((0, 4), ((0, 3),)), Piece((4, 8), ((2, 3), (4, 6))))),
}  # fmt: skip
LAID = pytest.mark.parametrize(
    ("sight", "rows", "at_once"),
    [pytest.param(sight, rows, at_once, id=f"{name}-{rows}-{at_once}")
     for name, sight in (SIGHTS | ODD).items() for rows in (1, 3) for at_once in (1, 60, 10**6)],
)  # fmt: skip

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
with_kernels = pytest.mark.skipif(
    not HAS_TRITON or (WHERE == "cpu") != INTERPRETED,
    reason="needs a GPU, or Triton with TRITON_INTERPRET=1",
)


def mask_of(sight: Sight) -> Tensor:
    """The dense mask [L, L] of a sight, True is seen."""
    seen = torch.zeros(sight.num_tokens, sight.num_tokens, dtype=torch.bool)
    for piece in sight.pieces:
        for start, stop in piece.keys:
            seen[slice(*piece.query), start:stop] = True
    return seen


def drawn(sight: Sight, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key and value [L, B, A, E], leaves, and a gradient."""
    shape = (sight.num_tokens, rows, *HEADS)
    made = [noise(shape, "sight", name).to(dtype) for name in ("q", "k", "v", "gradient")]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def masked(query: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
    """The same through one call with a dense mask."""
    inputs = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask_of(sight))
    return out.permute(2, 0, 1, 3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SIGHTS)
@pytest.mark.parametrize("at_once", [1, 200, 10**6])
def test_forward_and_gradients_are_those_of_masked_attention(name, rows, at_once, monkeypatch):
    monkeypatch.setattr(module, "_KEYS_AT_ONCE", at_once)
    batches.cache_clear()
    sight = SIGHTS[name]
    *inputs, gradient = drawn(sight, rows)
    assert kernel_for(*(x.permute(1, 2, 0, 3) for x in inputs)).num_kept == 1  # no second forward
    ours, expected = attend_seen(*inputs, sight), masked(*inputs, sight)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(ours, inputs, gradient)
    for mine, theirs in zip(found, torch.autograd.grad(expected, inputs, gradient), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=5e-6)
    batches.cache_clear()


def test_what_no_kernel_serves_is_computed_again_in_backward(monkeypatch):
    monkeypatch.setattr("megatron_kvpo.model.sdpa._TABLE", {})
    *inputs, gradient = drawn(SIGHTS["teacher"], 2)
    found = torch.autograd.grad(attend_seen(*inputs, SIGHTS["teacher"]), inputs, gradient)
    expected = torch.autograd.grad(masked(*inputs, SIGHTS["teacher"]), inputs, gradient)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=5e-6)


def test_bfloat16_is_as_near_as_its_rounding_and_autocast_is_taken():
    sight = SIGHTS["diffusion"]
    *narrow, gradient = drawn(sight, 1, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in narrow]
    found = torch.autograd.grad(attend_seen(*narrow, sight), narrow, gradient)
    expected = torch.autograd.grad(masked(*wide, sight), wide, gradient.float())
    for mine, theirs in zip(found, expected, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_seen(*wide, sight).dtype == torch.bfloat16


@pytest.mark.parametrize("held", [None, Held()], ids=["recomputed", "held"])
def test_recomputation_gives_the_same_bits_and_holding_runs_attention_once(held, monkeypatch):
    sight, forward, runs = SIGHTS["teacher"], module._forward, []
    monkeypatch.setattr(module, "_forward", lambda *a: runs.append(1) or forward(*a))
    *inputs, gradient = drawn(sight, 1)

    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_seen(query * 2, key.sin(), value + 1, sight).tanh()

    more = {}
    if held is not None:
        more["context_fn"] = lambda: (held.running(again=False), held.running(again=True))
    out = checkpoint(block, *inputs, use_reentrant=False, **more)
    if held is not None:
        assert held.num_bytes(ATTENTION) >= out.numel() * out.element_size()
    found = torch.autograd.grad(out, inputs, gradient)
    assert len(runs) == (2 if held is None else 1)
    assert held is None or held.num_bytes(ATTENTION) == 0
    assert holding._held is None
    for mine, theirs in zip(
        found, torch.autograd.grad(block(*inputs), inputs, gradient), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_block_sees_what_it_will_when_it_is_streamed():
    size, total = STREAM.block_frames, STREAM.num_frames
    history = total - size
    assert teacher_frames(STREAM) == [*range(history), *range(total)]
    teacher, diffusion = (mask_of(SIGHTS[n])[::TOKENS, ::TOKENS] for n in ("teacher", "diffusion"))
    for start in range(0, total, size):
        past, own = plain_context(start, STREAM), list(range(start, start + size))
        assert diffusion[start].nonzero().flatten().tolist() == [*past, *own]
        noisy = teacher[history + start].nonzero().flatten().tolist()
        assert noisy == [*past, *(history + frame for frame in own)]
        if start < history:
            assert teacher[start].nonzero().flatten().tolist() == [*past, *own]
    for sight in SIGHTS.values():
        assert sight.num_pairs == int(mask_of(sight).sum())


def test_pieces_of_one_shape_are_one_call_until_they_are_too_many():
    teacher = teacher_sight(STREAM, 1560)
    shapes = [(len(found), found[0].shape) for found in batches(teacher)]
    block = 3 * 1560
    assert shapes == [
        (2, (block, block)), (2, (block, 2 * block)), (2, (block, 3 * block)),
        (6, (block, 4 * block)), (5, (block, 4 * block)),
    ]  # fmt: skip


def keys_and_gradients(
    sight: Sight, rows: int, at_once: int, monkeypatch, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, module.Batches, list[list[Tensor]]]:
    """Key and value, batches of few keys, and what each gives: [R, A, M, E] in memory's ways."""
    monkeypatch.setattr(module, "_KEYS_AT_ONCE", at_once)
    found = batches.__wrapped__(sight)
    draw = functools.partial(noise, device=device)
    key, value = (draw((sight.num_tokens, rows, *HEADS), n).to(dtype) for n in ("k", "v"))
    gradients = []
    for number, pieces in enumerate(found):
        count, length = rows * len(pieces), pieces[0].shape[1]
        to_key = draw((count, HEADS[0], length, HEADS[1]), "k", number)
        to_value = draw((count, length, *HEADS), "v", number).transpose(1, 2)
        gradients.append([to_key.to(dtype), to_value.to(dtype)])
    return key, value, found, gradients


def summed(key: Tensor, value: Tensor, found: module.Batches, gradients) -> tuple[Tensor, Tensor]:
    sums = Sums(key, value, found)
    for number, (to_key, to_value) in enumerate(gradients):
        sums.add(number, to_key, to_value)
    return sums.finished()


@LAID
def test_tables_of_places_give_the_bits_of_the_sums_and_of_the_keys(
    sight, rows, at_once, monkeypatch
):
    """What is not written is no number, what is read before it is written either."""
    drawn = keys_and_gradients(sight, rows, at_once, monkeypatch, torch.bfloat16)
    key, _, found, gradients = drawn
    known = places(found, key.device, 3)
    out = torch.full_like(key, torch.nan)
    total = torch.full((known.shared, *key.shape[1:]), torch.nan)
    for number, (table, (gradient, _)) in enumerate(zip(known.tables, gradients, strict=True)):
        assert table.dtype == torch.int32
        parts = gradient.unflatten(0, (-1, rows)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        laid = torch.full_like(parts, torch.nan)
        for start, tokens, earlier, later, count, *at in table.tolist():
            one = slice(start, start + tokens)
            own = total[one].clone() if earlier else torch.zeros_like(key[one], dtype=total.dtype)
            for place in at[:count]:
                own += parts[place : place + tokens]
                laid[place : place + tokens] = key[one]
            (total if later else out)[one] = own
        laid = laid.unflatten(0, (-1, gradient.shape[2])).permute(0, 2, 3, 1, 4).flatten(0, 1)
        assert torch.equal(laid, seen_by(number, key, key, found)[0])
    assert torch.equal(out, summed(*drawn)[0])


@pytest.mark.gpu
@with_kernels
@LAID
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [8, 32])
def test_kernels_lay_keys_out_and_sum_to_the_bits_of_plain_torch(
    sight, rows, at_once, dtype, tile, monkeypatch
):
    from megatron_kvpo.model import kernels

    drawn = keys_and_gradients(sight, rows, at_once, monkeypatch, dtype, WHERE)
    apart = drawn[1].repeat_interleave(2, dim=-1)[..., ::2]
    monkeypatch.setattr(module, "_TILE", tile)
    results = []
    for found in (None, kernels):
        monkeypatch.setattr(module, "_kernels", lambda device, found=found: found)
        laid = [seen_by(n, drawn[0], apart, drawn[2]) for n in range(len(drawn[2]))]
        results.append([*summed(*drawn), *(x for both in laid for x in both)])
    for plain, ours in zip(*results, strict=True):
        assert ours.dtype == plain.dtype == dtype
        cut = INTERPRETED and dtype == torch.bfloat16  # the interpreter cuts, a GPU rounds
        torch.testing.assert_close(ours, plain, rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.gpu
@with_kernels
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_through_kernels_is_that_of_plain_torch(rows, monkeypatch):
    from megatron_kvpo.model import kernels

    results = []
    for found in (None, kernels):
        monkeypatch.setattr(module, "_kernels", lambda device, found=found: found)
        made = [x.detach().to(WHERE) for x in drawn(SIGHTS["teacher"], rows)]
        inputs, gradient = [x.requires_grad_() for x in made[:3]], made[3]
        out = attend_seen(*inputs, SIGHTS["teacher"])
        results.append([out, *torch.autograd.grad(out, inputs, gradient)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([], "must cover"),
        ([Piece((1, 3), ((0, 3),))], "must cover"),
        ([Piece((0, 2), ((0, 2),)), Piece((3, 4), ((0, 1),))], "must cover"),
        ([Piece((0, 4), ((0, 3), (2, 4)))], "keys must lie apart"),
        ([Piece((0, 4), ((0, 5),))], "keys must lie apart"),
        ([Piece((0, 4), ())], "there must be some"),
    ],
)
def test_a_sight_that_is_none_is_refused(pieces, words):
    with pytest.raises(ValueError, match=words):
        Sight(tuple(pieces))


def test_a_pass_of_another_length_is_refused():
    *inputs, _ = drawn(SIGHTS["teacher"], 1)
    with pytest.raises(ValueError, match="sight is of 108 tokens, the pass has 204"):
        attend_seen(*inputs, SIGHTS["diffusion"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.01), (torch.float32, 1e-4)])
def test_on_a_gpu_it_is_masked_attention_without_a_second_forward(dtype, limit):
    sight = teacher_sight(STREAM, 96)
    shape = (sight.num_tokens, 1, 2, 128)
    made = [noise(shape, "gpu", n, device="cuda").to(dtype) for n in ("q", "k", "v", "g")]
    inputs, gradient = [x.requires_grad_() for x in made[:3]], made[3]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    assert kernel_for(*(x.permute(1, 2, 0, 3) for x in inputs)).num_kept == 3
    ours = attend_seen(*inputs, sight)
    scores = torch.einsum("lbae,mbae->balm", wide[0], wide[1]) / 128**0.5
    scores = scores.masked_fill(~mask_of(sight).cuda(), -torch.inf)
    expected = torch.einsum("balm,mbae->lbae", scores.softmax(-1), wide[2])
    pairs = [(ours, expected)]
    pairs += zip(torch.autograd.grad(ours, inputs, gradient),
                 torch.autograd.grad(expected, wide, gradient.double()), strict=True)  # fmt: skip
    for mine, theirs in pairs:
        assert float((mine.double() - theirs).norm() / theirs.norm()) < limit
