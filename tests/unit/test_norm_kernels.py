"""Kernels of passes with a graph are their formulas, and so are all their gradients."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_kvpo.model import fused
from megatron_kvpo.parallel.seeds import noise

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not HAS_TRITON or (WHERE == "cpu") != INTERPRETED,
        reason="needs a GPU, or Triton with TRITON_INTERPRET=1",
    ),
]

EPS = 1e-6
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Largest difference over the largest value."""

SIZES = pytest.mark.parametrize("dim", [48, 1536])
TYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
ROWS = pytest.mark.parametrize("rows", [1, 3])


def drawn(dtype: torch.dtype, *shape: int, name: str) -> Tensor:
    """Numbers of a type, none near where a mean or a sum would vanish."""
    return (noise(shape, "norms", name) + 0.5).to(dtype).to(WHERE)


def check(
    function: Callable[..., object], plain: Callable[..., object], inputs: list[Tensor | None],
    dtype: torch.dtype, wanted: list[bool] | None = None,
) -> None:  # fmt: skip
    """Values and gradients of all inputs, against the formula in float64 on the CPU."""
    results = []
    for call, exact in ((function, False), (plain, True)):
        own = [None if x is None else (x.cpu().double() if exact else x).detach() for x in inputs]
        for x, needed in zip(own, wanted or [True] * len(own), strict=True):
            if x is not None and needed:
                x.requires_grad_()
        made = call(*own)
        outs = [x for x in (made if isinstance(made, tuple) else (made,)) if x.requires_grad]
        pushed = [noise(tuple(o.shape), "push", i).to(o) for i, o in enumerate(outs)]
        leaves = [x for x in own if x is not None and x.requires_grad]
        found = torch.autograd.grad(outs, leaves, pushed)
        results.append([*outs, *found])
        if not exact:
            assert [g.dtype for g in found] == [x.dtype for x in leaves]
    for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert ours.shape == theirs.shape
        far = (ours.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert far < LIMITS[dtype], f"result {number}"


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of a few tokens, of which the last is not full."""
    monkeypatch.setattr(module(), "_TOKENS", 8)


def module():  # type: ignore[no-untyped-def]
    from megatron_kvpo.model import norm_kernels

    return norm_kernels


LENGTH = 33
MODULATIONS = {"one": 1, "parts": 3, "token": LENGTH, "own": 0}
"""Parts of the tokens that have values of their own."""


def modulation(kind: str, rows: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Shift, scale and gate as a block has them: views of a tensor of six, or a norm's own."""
    parts = MODULATIONS[kind]
    six = drawn(dtype, max(1, parts), rows, 6, dim, name="six").unbind(2)
    if parts == 0:
        return [drawn(dtype, dim, name="shift"), drawn(dtype, dim, name="scale"), six[2]]
    return list(six[1:4])


@SIZES
@TYPES
@ROWS
@pytest.mark.parametrize("kind", list(MODULATIONS))
@pytest.mark.parametrize("change", ["", "update", "gate"])
def test_a_sum_and_its_norm_have_the_formulas_gradients(change, kind, rows, dtype, dim):
    plus_one = kind != "own"
    x, update = (drawn(dtype, LENGTH, rows, dim, name=name) for name in ("x", "update"))
    shift, scale, gate = modulation(kind, rows, dim, dtype)
    inputs = [x, update if change else None, gate if change == "gate" else None, shift, scale]

    def ours(*values: Tensor) -> object:
        return module().residual_norm(*values, EPS, plus_one=plus_one)

    def plain(*values: Tensor) -> object:
        return fused.residual_norm(*values, EPS, plus_one=plus_one)

    check(ours, plain, inputs, dtype)
    check(ours, plain, inputs, dtype, [True, True, False, False, False])
    check(lambda *v: ours(*v)[1], lambda *v: plain(*v)[1], inputs, dtype)  # type: ignore[index]
    if change:
        check(lambda *v: ours(*v)[0], lambda *v: plain(*v)[0], inputs[:3] + inputs[3:], dtype,
              [True, True, True, False, False])  # fmt: skip


def test_tiles_of_full_size_add_up_too(monkeypatch):
    monkeypatch.undo()
    assert module()._TOKENS > 8
    x, update = (drawn(torch.float32, 2 * 83, 1, 48, name=name) for name in ("x", "update"))
    shift, scale, gate = drawn(torch.float32, 2, 1, 6, 48, name="six").unbind(2)[1:4]
    check(
        lambda *v: module().residual_norm(*v, EPS, plus_one=True),
        lambda *v: fused.residual_norm(*v, EPS, plus_one=True),
        [x, update, gate, shift, scale], torch.float32,
    )  # fmt: skip


@SIZES
@TYPES
@pytest.mark.parametrize("kind", ["one", "parts", "token", None])
def test_a_residual_has_the_formulas_gradients(kind, dtype, dim):
    x, update = (drawn(dtype, LENGTH, 2, dim, name=name) for name in ("x", "update"))
    gate = None if kind is None else modulation(kind, 2, dim, dtype)[2]
    check(module().gated_add, fused.gated_add, [x, update, gate], dtype)


def test_a_wider_sum_stays_wide():
    """Under autocast tokens are float32 and what products make is not."""
    x, update = (drawn(t, 40, 1, 48, name="x") for t in (torch.float32, torch.bfloat16))
    total = module().gated_add(x, update.requires_grad_(), None)
    assert total.dtype == torch.float32
    (to_update,) = torch.autograd.grad(total.sum(), [update])
    assert to_update.dtype == torch.bfloat16
    assert (to_update == 1).all()


@SIZES
@TYPES
@ROWS
@pytest.mark.parametrize("given", [False, True], ids=["", "total"])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_rms_norms_have_the_formulas_gradients_turned_or_not(parts, given, rows, dtype, dim):
    length = 21
    x, weight = drawn(dtype, length, rows, dim, name="x"), drawn(dtype, dim, name="weight")
    angle = noise((length, dim // 12), "angle").to(WHERE)
    table = torch.stack([angle.cos(), angle.sin()])
    total = (x.float() * 1.5).square().sum(dim=-1, keepdim=True) if given else None
    whole = dim * 2 if given else dim

    def ours(*values: Tensor) -> object:
        return module().rms(*values, whole, EPS, *((table, parts) if parts else ()))

    def plain(*values: Tensor) -> object:
        if parts:
            return fused.rms_rotated(*values, table.cpu().double(), whole, EPS, parts)
        return fused.rms_scaled(*values, whole, EPS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the formula in float64
        check(ours, plain, [x, total, weight], dtype)
        check(ours, plain, [x, total, weight], dtype, [True, given, False])


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_may_lie_anyhow(rows):
    """Attention hands its own over as its layout has it."""
    x, weight = (drawn(torch.float32, *s, name="x") for s in ((40, rows, 48), (48,)))
    angle = noise((40, 4), "angle").to(WHERE)
    table = torch.stack([angle.cos(), angle.sin()])
    push = noise((40, rows, 6, 8), "push").to(WHERE)
    results = []
    for laid in (push, push.transpose(0, 1).contiguous().transpose(0, 1),
                 push.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):  # fmt: skip
        own = x.detach().requires_grad_()
        out = module().rms(own, None, weight, 48, EPS, table, 1)
        results.append(torch.autograd.grad(out, own, laid)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
