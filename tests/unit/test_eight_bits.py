"""Products in 8 bits: near the plain ones, row by row, and exact where a run relies on it."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_kvpo import settings
from megatron_kvpo.config import RunConfig
from megatron_kvpo.model.eight_bits import RowScaled, check_scaling
from megatron_kvpo.model.fused import FP8, EightBits, Form, gelu_in, in_form, quantise_rows
from megatron_kvpo.model.lora import Adapter
from megatron_kvpo.model.product import Weight, product
from megatron_kvpo.parallel.seeds import noise
from megatron_kvpo.training.pretrain import PretrainConfig
from tests.unit import small
from tests.unit.test_lora import move, velocity

ranks = small.ranks

LARGEST = 448.0
"""Of e4m3, which has 3 bits behind the point; below 2^-6 its numbers are 2^-9 apart."""

FP8_ALL, MERGE = "model.fp8=[ffn,attention,text]", "policy.merge=true"
FAST = [(FP8_ALL,), (MERGE,), (FP8_ALL, MERGE)]
IN, OUT = 48, 40
TYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)


def drawn(*shape: int, name: str = "x", dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different size."""
    sizes = torch.logspace(-3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return (noise(shape, name) * sizes).to(dtype)


def off(ours: Tensor, exact: Tensor) -> float:
    """Relative error in the norm."""
    return float((ours.double() - exact).norm() / exact.norm())


@TYPES
def test_a_rows_unit_is_its_largest_over_the_types_and_each_number_is_near(dtype):
    x = drawn(20, 300, dtype=dtype)
    tokens, unit = quantise_rows(x, FP8)
    assert (tokens.dtype, unit.dtype, unit.shape) == (FP8, torch.float32, (20, 1))
    assert torch.equal(unit, x.float().abs().amax(1, keepdim=True) / LARGEST)
    assert (tokens.float().abs().amax(1) == LARGEST).all()
    exact, unit = x.double(), unit.double()
    error = (tokens.double() * unit - exact).abs()
    bound = torch.maximum(2.0**-4 * exact.abs(), 2.0**-10 * unit) * (1 + 1e-6)
    assert (error <= bound).all()
    assert (error <= 2.0**-4 * exact.abs().amax(1, keepdim=True)).all()


def test_a_row_of_zeros_is_zeros():
    tokens, unit = quantise_rows(torch.zeros(2, 8), FP8)
    assert not tokens.float().any()
    assert (unit > 0).all()
    assert unit.isfinite().all()
    held = RowScaled(noise((OUT, 8), "weight"))
    assert not held.times(torch.zeros(2, 8), None).any()


def test_a_row_changes_no_bit_of_another():
    x = drawn(6, IN)
    other = x.clone()
    other[2] = 1e4 * noise((IN,), "other")
    held, bias = RowScaled(noise((OUT, IN), "weight")), noise((OUT,), "bias")
    pairs = zip((*quantise_rows(x, FP8), held.times(x, bias)),
                (*quantise_rows(other, FP8), held.times(other, bias)), strict=True)  # fmt: skip
    for before, after in pairs:
        same = (before.float() == after.float()).all(1)
        assert same.tolist() == [True, True, False, True, True, True]


@TYPES
def test_its_product_is_the_plain_one_to_a_few_parts_in_a_hundred(dtype):
    """Tokens and output features of very different size, each seen at its own."""
    weight, x = drawn(OUT, IN, name="weight", dtype=dtype), drawn(7, IN, dtype=dtype)
    held, bias = RowScaled(weight), noise((OUT,), "bias").to(dtype)
    out, exact = held.times(x, None), x.double() @ weight.double().t()
    assert out.dtype == dtype
    sizes = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert 1e-2 < off(out / sizes, exact / sizes) < 5e-2
    close = {"rtol": 2**-7, "atol": 2**-7} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(held.times(x, bias), out + bias, **close)


def test_a_refilled_product_is_one_of_the_new_weight_in_the_same_memory():
    x, second = drawn(7, IN), drawn(OUT, IN, name="second")
    held = RowScaled(noise((OUT, IN), "weight"))
    before, places = held.times(x, None), {n: t.data_ptr() for n, t in vars(held).items()}
    held.refill(second)
    assert torch.equal(held.times(x, None), RowScaled(second).times(x, None))
    assert not torch.equal(held.times(x, None), before)
    assert {n: t.data_ptr() for n, t in vars(held).items()} == places


@TYPES
@torch.no_grad()
def test_tokens_in_8_bits_give_the_bits_of_plain_ones(dtype):
    x, weight = drawn(3, 2, IN, dtype=dtype), noise((OUT, IN), "weight").to(dtype)
    eight, bias = in_form(x, Form(eight_bits=True)), noise((OUT,), "bias").to(dtype)
    held = RowScaled(weight)
    assert torch.equal(held.times(eight, bias), held.times(x.view(-1, IN), bias))
    layer = Weight(nn.Parameter(weight, requires_grad=False), "row", None)
    plain = product(x, layer, bias, None)
    assert plain.shape == (3, 2, OUT)
    assert torch.equal(plain.view(-1, OUT), held.times(eight, bias))
    assert torch.equal(product(eight, layer, bias, None), plain)


@torch.no_grad()
def test_an_adapter_beside_8_bits_sees_the_tokens_as_they_are():
    x, weight = noise((3, 2, IN), "x"), noise((OUT, IN), "weight")
    layer = Weight(nn.Parameter(weight, requires_grad=False), "row", None)
    adapter = Adapter(IN, OUT, 4, 6.0, 0, sequence=False)
    down, up = adapter.lora_A["old"], adapter.lora_B["old"]
    for name, value in (("A", down), ("B", up)):
        value.copy_(noise(tuple(value.shape), name))
    bare = product(x, layer, None, adapter)
    adapter.choose("old")
    for tokens in (x, in_form(x, Form(eight_bits=True))):
        beside = product(tokens, layer, None, adapter) - bare
        assert off(beside, 1.5 * x.double() @ down.double().t() @ up.double().t()) < 1e-6


@torch.no_grad()
def test_a_form_on_a_cpu_is_8_bits_or_plain_and_has_no_margin():
    x = drawn(3, 2, IN)
    assert in_form(x, Form()) is x
    assert in_form(x, Form(margin=4)) is x
    with torch.enable_grad():
        assert in_form(x, Form(eight_bits=True)) is x, "a graph needs plain tokens"
    active = functional.gelu(x, approximate="tanh")
    assert torch.equal(gelu_in(x.clone(), Form(margin=4)), active)
    for whole in (True, False):
        form = Form(eight_bits=True, whole=whole)
        for found, plain in ((in_form(x, form), x), (gelu_in(x.clone(), form), active)):
            tokens, unit = quantise_rows(plain.view(-1, IN), FP8)
            assert torch.equal(found.tokens_RD.float(), tokens.float())
            assert torch.equal(found.unit_R1, unit)
            assert (found.shape, found.dtype) == ((3, 2, IN), torch.float32)
            assert (found.whole_RD is not None) == whole
            assert not whole or torch.equal(found.whole_RD, plain.view(-1, IN))


@torch.no_grad()
def test_a_product_leaves_its_gelu_in_the_form_that_is_asked_for():
    x, bias = drawn(3, 2, IN), noise((OUT,), "bias")
    layer = Weight(nn.Parameter(noise((OUT, IN), "weight"), requires_grad=False), "row", None)
    active = functional.gelu(product(x, layer, bias, None), approximate="tanh")
    assert torch.equal(product(x, layer, bias, None, gelu=Form()), active)
    found = product(x, layer, bias, None, gelu=Form(eight_bits=True))
    assert isinstance(found, EightBits)
    assert torch.equal(found.whole_RD, active.view(-1, OUT))


def test_the_gradient_passes_through_the_weight_as_it_is():
    x = noise((5, IN), "x").requires_grad_()
    weight = nn.Parameter(noise((OUT, IN), "weight"), requires_grad=False)
    out = product(x, Weight(weight, "row", None), None, None)
    assert torch.equal(out.detach(), RowScaled(weight.detach()).times(x.detach(), None))
    (found,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand(5, -1))


@torch.no_grad()
def test_a_weight_that_changes_in_place_is_rounded_anew():
    x, weight = noise((5, IN), "x"), nn.Parameter(noise((OUT, IN), "weight"), requires_grad=False)
    layer = Weight(weight, "row", None)
    product(x, layer, None, None)
    weight.mul_(-1.5)
    assert torch.equal(product(x, layer, None, None), RowScaled(weight).times(x, None))


@pytest.mark.parametrize(
    ("found", "device", "message"),
    [
        (None, "cuda", "block and Transformer Engine is not installed: install it, or set model"),
        (None, "cpu", "Transformer Engine is not installed"),
        (SimpleNamespace(), "cpu", "block and the device is cpu: .* needs a GPU; set model"),
    ],
)
def test_blocks_without_transformer_engine_or_a_gpu_are_refused(
    ranks, monkeypatch, found, device, message
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match=message):
        check_scaling("block", torch.bfloat16, torch.device(device))
    check_scaling("row", torch.float32, torch.device("cpu"))
    if device == ranks.device.type:
        with pytest.raises(ValueError, match=message):
            small.build(ranks, "model.fp8=[text]", "model.fp8_scaling=block")
        small.build(ranks, "model.fp8_scaling=block")  # which nothing asks for


def test_blocks_are_taken_where_they_can_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_scaling("block", torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("dtype", "capability", "message"),
    [
        (torch.float32, (9, 0), "gives bfloat16 and model.dtype is torch.float32: set model.dtype"),
        (torch.bfloat16, (8, 0), r"8.9 or later, cuda has \(8, 0\): leave it out"),
    ],
)
def test_a_gpu_that_cannot_is_refused(monkeypatch, dtype, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=message):
        check_scaling("row", dtype, torch.device("cuda"))


def test_sizes_that_do_not_divide_are_refused(ranks):
    with pytest.raises(ValueError, match="40 x 32, 8-bit products take multiples of 16: leave"):
        small.build(ranks, "model.fp8=[ffn]", "model.ffn_dim=40")


@pytest.mark.parametrize("what", [RunConfig, PretrainConfig])
def test_a_base_that_trains_is_refused(what):
    values = {"model": {"fp8": ["ffn"]}}
    if what is RunConfig:
        values["policy"] = {"mode": "full"}
    with pytest.raises(ValueError, match=r"model.fp8 is \['ffn'\]"):
        settings.from_mapping(what, values)


def build(ranks, *overrides: str) -> small.Small:
    """Current and old stirred alike."""
    tiny = small.build(ranks, *overrides)
    tiny.stir("current", size=0.05)
    tiny.policy.bank.copy("current", "old")
    return tiny


@pytest.mark.parametrize("slot", [None, "current"])
def test_each_family_in_8_bits_is_near_the_plain_model_and_all_together_too(ranks, slot):
    plain, seen = velocity(build(ranks), slot), []
    for families in ("ffn", "attention", "text", "ffn,attention,text"):
        found = velocity(build(ranks, f"model.fp8=[{families}]"), slot)
        assert 2e-3 < float((found - plain).norm() / plain.norm()) < 6e-2, families
        assert not any(torch.equal(found, other) for other in seen)
        seen.append(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_policies_are_near_those_beside_and_the_base_is_bare(ranks, dtype):
    merged, beside = (
        build(ranks, f"model.dtype={dtype}", m) for m in (MERGE, "policy.merge=false")
    )
    base = dict(merged.model.named_parameters())
    kept = {name: p.detach().clone() for name, p in base.items()}
    assert torch.equal(velocity(merged, None), velocity(beside, None))
    found, wanted = velocity(merged, "current"), velocity(beside, "current")
    assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if dtype == "float32" else 2e-2)
    assert not torch.equal(found, wanted), "it is not merged"
    assert all(torch.equal(base[name], value) for name, value in kept.items())


@pytest.mark.parametrize("overrides", FAST)
def test_a_row_of_a_batch_never_depends_on_the_others(ranks, overrides):
    """Bit for bit in batches of one size; alone, as docs/numerics.md says, up to rounding."""
    tiny = build(ranks, *overrides)
    noisy, time = tiny.latents(3, 3), torch.tensor([[900.0], [500.0], [100.0]])
    with tiny.policy.acting("current"), torch.no_grad():
        text = tiny.text(*small.TEXTS)
        together = tiny.model(noisy, time, range(3), text)
        for row in range(3):
            other = 50 * tiny.latents(3, 3, "other")
            other[row] = noisy[row]
            assert torch.equal(tiny.model(other, time, range(3), text)[row], together[row])
            keys = text.select(torch.tensor([row]))
            alone = tiny.model(noisy[row : row + 1], time[row : row + 1], range(3), keys)
            assert off(alone[0], together[row].double()) < (2e-2 if FP8_ALL in overrides else 1e-5)


@pytest.mark.parametrize("overrides", FAST)
def test_the_anchors_energy_is_zero_and_adapters_have_gradients(ranks, overrides):
    tiny = build(ranks, *overrides, "model.dtype=bfloat16")
    groups = tiny.stages.explore(0)
    first, again = (tiny.stages.energies(0, groups, slot) for slot in ("old", "current"))
    assert not first.anchor_P.any()
    assert (first.branch_PG > 0).all()
    assert torch.equal(first.branch_PG, again.branch_PG), "the ratio is not 1 at the start"
    with tiny.policy.acting("current"):
        tiny.energies(groups[0], "current", grad=True).sum().backward()
    for name, p in tiny.policy.trained().items():
        assert p.main_grad.any(), name
    tiny.policy.optimizer.zero_grad()
    for sampled in groups:
        sampled.release()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("overrides", FAST)
def test_a_small_step_of_current_is_seen_and_old_stays(ranks, overrides, dtype):
    tiny = build(ranks, *overrides, f"model.dtype={dtype}")
    before = velocity(tiny, "old")
    assert torch.equal(velocity(tiny, "current"), before)
    move(tiny, 1e-3)
    found = velocity(tiny, "current")
    assert 1e-5 < float((found - before).norm() / before.norm()) < 0.1
    assert torch.equal(velocity(tiny, "old"), before)


def test_recomputation_repeats_the_numbers_of_its_pass(ranks):
    found = []
    for recompute in ("false", "true"):
        tiny = build(ranks, FP8_ALL, MERGE, f"model.recompute={recompute}")
        with tiny.policy.acting("current"):
            text = tiny.model.encode_text(tiny.encode(small.TEXTS[:1]))
            out = tiny.model(tiny.latents(3), torch.full((1, 1), 800.0), range(3), text)
            trained = tiny.policy.trained()
            found.append(torch.autograd.grad(out.square().sum(), list(trained.values())))
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))
