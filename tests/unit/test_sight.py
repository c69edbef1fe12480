"""Attention over what is seen equals masked attention, and nothing that is not seen leaks in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_kvpo.config import StreamConfig
from megatron_kvpo.model import sight as module
from megatron_kvpo.model.sdpa import kernel_for
from megatron_kvpo.model.sight import (
    Held,
    Piece,
    Sight,
    attend_seen,
    batches,
    diffusion_sight,
    teacher_frames,
    teacher_sight,
)
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.routing import plain_context

TOKENS = 4
STREAM = StreamConfig(num_frames=27, resident_frames=27)
SIGHTS = {"teacher": teacher_sight(STREAM, TOKENS), "diffusion": diffusion_sight(STREAM, TOKENS)}
HEADS = 2, 16


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
        assert held.num_bytes >= out.numel() * out.element_size()
    found = torch.autograd.grad(out, inputs, gradient)
    assert len(runs) == (2 if held is None else 1)
    assert held is None or held.num_bytes == 0
    assert module._held is None
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
