"""A frozen layer's product, its adapter beside it or in its weight, is the plain formula."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_kvpo.model.fused import Form
from megatron_kvpo.model.lora import SLOTS, Adapter
from megatron_kvpo.model.product import Weight, dithered, product
from megatron_kvpo.parallel.seeds import noise

IN, OUT, RANK, ALPHA = 12, 10, 4, 6.0
FLOAT, HALF = torch.float32, torch.bfloat16
CLOSE = {FLOAT: 1e-6, HALF: 2e-2}
"""Largest difference over the largest value."""


class Layer(NamedTuple):
    weight: nn.Parameter
    bias: nn.Parameter
    adapter: Adapter
    held: Weight

    def out(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        return product(x, self.held, self.bias, self.adapter, gelu=Form() if gelu else None)

    def bare(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def merged(self, slot: str) -> Tensor:
        """W + s B A in float64."""
        down, up = (table[slot].double() for table in (self.adapter.lora_A, self.adapter.lora_B))
        return self.weight.double() + ALPHA / RANK * up @ down

    def expected(self, x: Tensor, slot: str | None) -> Tensor:
        weight = self.weight.double() if slot is None else self.merged(slot)
        return functional.linear(x.double(), weight, self.bias.double())


def layer(
    dtype: torch.dtype = FLOAT, scaling: str | None = None, merges: int | None = None
) -> Layer:
    weight = nn.Parameter(noise((OUT, IN), "weight").to(dtype), requires_grad=False)
    bias = nn.Parameter(noise((OUT,), "bias").to(dtype), requires_grad=False)
    adapter = Adapter(IN, OUT, RANK, ALPHA, 0, sequence=False, dtype=dtype)
    with torch.no_grad():
        for slot in SLOTS:
            adapter.lora_A[slot].copy_(noise((RANK, IN), "A", slot))
            adapter.lora_B[slot].copy_(noise((OUT, RANK), "B", slot))
    held = Weight(weight, scaling, merges)
    adapter.chosen = held.merge
    return Layer(weight, bias, adapter, held)


def apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
@pytest.mark.parametrize("slot", ["current", "old", None])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
def test_it_is_the_formula_with_and_without_a_graph(dtype, slot, gelu):
    built, x = layer(dtype), noise((2, 3, IN), "x").to(dtype)
    built.adapter.choose(slot)
    exact = built.expected(x, slot)
    if gelu:
        exact = functional.gelu(exact, approximate="tanh")
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            out = built.out(x, gelu=gelu)
        assert (out.shape, out.dtype) == ((2, 3, OUT), dtype)
        assert out.requires_grad == (graph and slot == "current")
        assert apart(out.detach(), exact) < CLOSE[dtype]


def test_bias_and_adapter_may_be_missing_and_the_input_lie_in_any_order():
    built, x = layer(), noise((3, IN, 2), "x").transpose(1, 2)
    for graph in (False, True):
        with torch.set_grad_enabled(graph):
            found = product(x, built.held, None, None)
        torch.testing.assert_close(found, functional.linear(x, built.weight))


def gradients(out: Tensor, x: Tensor, *pair: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * noise(tuple(out.shape), "to").to(out)).sum(), (x, *pair))


@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
def test_gradients_are_those_of_the_formula_and_the_adapters_are_float32(dtype, lead):
    built, x = layer(dtype), noise((*lead, IN), "x").to(dtype).requires_grad_()
    built.adapter.choose("current")
    pair = built.adapter.lora_A["current"], built.adapter.lora_B["current"]
    exact = gradients(built.expected(x, "current"), x, *pair)
    found = gradients(built.out(x), x, *pair)
    assert [g.dtype for g in found] == [dtype, FLOAT, FLOAT]
    for ours, theirs in zip(found, exact, strict=True):
        assert apart(ours, theirs) < CLOSE[dtype]


@pytest.mark.parametrize("slot", ["old", None])
def test_what_does_not_train_passes_the_gradient_on_and_takes_none(slot):
    built, x = layer(), noise((2, 3, IN), "x").requires_grad_()
    built.adapter.choose(slot)
    (exact,) = gradients(built.expected(x, slot), x)
    (found,) = gradients(built.out(x), x)
    assert apart(found, exact) < 1e-6
    built.out(x).sum().backward()
    assert all(p.grad is None for p in (built.weight, built.bias, *built.adapter.parameters()))


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
def test_backward_works_after_its_slot_was_left_and_not_after_another_was_chosen(dtype):
    built, x = layer(dtype), noise((5, IN), "x").to(dtype).requires_grad_()
    pair = built.adapter.lora_A["current"], built.adapter.lora_B["current"]
    found = []
    for after in ("current", None):
        built.adapter.choose("current")
        out = built.out(x)
        built.adapter.choose(after)
        found.append(gradients(out, x, *pair))
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))
    for after in (("old",), ("old", None)):
        built.adapter.choose("current")
        out = built.out(x)
        for slot in after:
            built.adapter.choose(slot)
        with pytest.raises(RuntimeError, match="another adapter slot was chosen between"):
            out.sum().backward()


def test_a_weight_that_trains_has_its_gradient_and_no_adapter_that_acts():
    built, x = layer(), noise((5, IN), "x")
    built.weight.requires_grad_()
    out = built.out(x)
    (found,) = torch.autograd.grad(out.sum(), built.weight)
    assert apart(found, x.double().sum(0).expand(OUT, IN)) < 1e-6
    built.adapter.choose("old")
    with pytest.raises(RuntimeError, match="freeze the base"):
        built.out(x)


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
def test_an_adapter_in_the_margins_acts_as_beside_the_weight(dtype):
    built, x = layer(dtype), noise((2, 3, IN), "x").to(dtype)
    before, bits = built.weight, built.weight.clone()
    margin = built.held.make_margin(RANK)
    assert built.weight is before
    assert torch.equal(built.weight, bits)
    assert margin.shape == (OUT, RANK)
    built.adapter.place_up(margin)
    roomy = torch.full((2, 3, IN + RANK), torch.nan, dtype=dtype)
    roomy[..., :IN] = x
    for slot in ("current", "old"):
        built.adapter.choose(slot)
        with torch.no_grad():
            assert apart(built.out(roomy), built.expected(x, slot)) < CLOSE[dtype]
            assert apart(built.out(x), built.expected(x, slot)) < CLOSE[dtype], "x without room"
        assert apart(built.out(x).detach(), built.expected(x, slot)) < CLOSE[dtype], "with a graph"
    assert torch.equal(roomy[..., :IN], x)
    assert torch.equal(built.weight, bits)
    built.adapter.choose(None)
    with torch.no_grad():
        torch.testing.assert_close(built.out(x), functional.linear(x, bits, built.bias))


@torch.no_grad()
def test_a_weight_with_a_margin_is_seen_whole_and_as_it_is_now():
    built, x = layer(), noise((5, IN + RANK), "x")
    margin = built.held.make_margin(RANK)
    built.adapter.place_up(margin)
    built.adapter.choose("old")
    for shift in (0.0, 1.0):
        built.weight.add_(shift)
        up = ALPHA / RANK * built.adapter.lora_B["old"]
        assert torch.equal(
            built.held.with_adapter(built.adapter.acting), torch.cat([built.weight, up], 1)
        )
        exact = built.expected(x[:, :IN], "old")
        assert apart(built.out(x.clone()), exact) < 1e-6


@pytest.mark.parametrize("graph", [False, True])
def test_the_first_updates_of_an_adapter_are_not_rounded_away(graph):
    """In bfloat16 a term far below the product's last bit counts on average."""
    built, x = layer(torch.bfloat16), noise((2000, IN), "x").bfloat16()
    pair, outs = built.adapter.lora_A["old"], []
    up = built.adapter.lora_B["old"]
    drawn = 5e-4 * noise(tuple(up.shape), "first")
    for value in (torch.zeros_like(up), drawn):
        with torch.no_grad():
            up.copy_(value)
        built.adapter.choose("old")
        with torch.set_grad_enabled(graph):
            outs.append(built.out(x).detach().double())
    exact = (x.double() @ pair.double().t()) @ (ALPHA / RANK * drawn.double()).t()
    moved = outs[1] - outs[0]
    assert exact.abs().mean() < 2**-9 * outs[0].abs().mean()
    assert float((moved * exact).sum() / exact.square().sum()) == pytest.approx(1, abs=0.15)


MANY = 100_000


@pytest.mark.parametrize("value", [1 + 2**-12, -1 - 2**-12, 3.3, -0.1, 1e-30])
def test_a_dithered_number_is_right_on_average(value):
    """Within 4 standard errors, where rounding to the nearest is off by far more."""
    x = torch.full((MANY,), value)
    found = dithered(x, HALF, 1)
    assert found.dtype == HALF
    low, high = (v.double().item() for v in found.aminmax())
    exact = x[0].double().item()
    assert low < exact < high
    assert high - low == 2.0 ** (math.floor(math.log2(abs(exact))) - 7), "not its neighbours"
    error = math.sqrt((exact - low) * (high - exact) / MANY)
    assert abs(found.double().mean().item() - exact) < 4 * error
    assert abs(x[0].to(HALF).double().item() - exact) > 10 * error


def test_a_small_change_moves_the_dithered_numbers_by_itself_on_average():
    """The same chance before and after, so that a change alone decides what moves, and its way."""
    x, delta = noise((MANY,), "x"), 2.0**-14
    for seed in (0, 7):
        moved = dithered(x + delta, HALF, seed).double() - dithered(x, HALF, seed).double()
        assert (moved >= 0).all()
        assert 0 < (moved > 0).float().mean() < 0.1
        assert abs(moved.mean().item() - delta) < 4 * moved.std().item() / math.sqrt(MANY)


def test_what_bfloat16_holds_is_left_and_a_seed_repeats_its_chances():
    held = torch.cat([noise((MANY,), "x"), torch.tensor([0.0, -0.0, 1e-38, torch.inf, -torch.inf])])
    held = held.to(HALF)
    for seed in range(3):
        found = dithered(held.float(), HALF, seed)
        assert torch.equal(found.view(torch.int16), held.view(torch.int16))
    x = noise((MANY,), "x")
    assert torch.equal(dithered(x, HALF, 3), dithered(x, HALF, 3))
    assert not torch.equal(dithered(x, HALF, 3), dithered(x, HALF, 4))
    assert torch.equal(dithered(x, FLOAT, 3), x), "float32 has nothing to round"


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
def test_merged_passes_without_a_graph_multiply_by_the_sum_and_leave_the_weight(dtype):
    built, x = layer(dtype, merges=2), noise((2, 3, IN), "x").to(dtype)
    bits = built.weight.clone()
    places = set()
    for slot in ("current", "old", "current"):
        built.adapter.choose(slot)
        with torch.no_grad():
            whole = built.held.value(merged=True)
            assert apart(whole, built.merged(slot)) < (1e-6 if dtype == FLOAT else 2**-7)
            assert torch.equal(built.out(x), functional.linear(x, whole, built.bias))
            assert apart(built.out(x), built.expected(x, slot)) < CLOSE[dtype]
        places.add(whole.data_ptr())
        assert torch.equal(built.weight, bits), "the base has the adapter in it"
    assert len(places) == 1, "a captured pass would read what lies elsewhere now"


def test_merged_weights_are_dithered_by_their_layers_number():
    first, again, other = (layer(HALF, merges=number) for number in (0, 0, 1))
    for built in (first, again, other):
        built.adapter.choose("old")
    assert torch.equal(first.held.value(merged=True), again.held.value(merged=True))
    assert not torch.equal(first.held.value(merged=True), other.held.value(merged=True))


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])
def test_merged_layers_have_the_adapter_beside_under_a_graph(dtype):
    merged, beside, x = layer(dtype, merges=0), layer(dtype), noise((5, IN), "x").to(dtype)
    x.requires_grad_()
    found = []
    for built in (merged, beside):
        built.adapter.choose("current")
        out = built.out(x)
        pair = built.adapter.lora_A["current"], built.adapter.lora_B["current"]
        found.append((out, *gradients(out, x, *pair)))
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))


@pytest.mark.parametrize("scaling", [None, "row"])
@torch.no_grad()
def test_a_merged_layer_that_is_left_is_bare_again(scaling):
    """And not in 8 bits, even if its merged weight is."""
    built, bare, x = layer(scaling=scaling, merges=0), layer(), noise((5, IN), "x")
    wanted = bare.out(x)
    assert torch.equal(built.out(x), wanted)
    for slot in ("current", "old"):
        built.adapter.choose(slot)
        exact = built.expected(x, slot)
        error = (built.out(x) - exact).norm() / exact.norm()
        assert error < (1e-6 if scaling is None else 5e-2)
        built.adapter.choose(None)
        assert torch.equal(built.out(x), wanted)


def test_a_merged_weight_in_8_bits_is_refilled_where_it_is():
    built, places = layer(scaling="row", merges=0), []
    for slot in ("current", "old"):
        built.adapter.choose(slot)
        held = built.held._product(merged=True)
        places.append({name: value.data_ptr() for name, value in vars(held).items()})
    assert places[0] == places[1], "a captured pass would read what lies elsewhere now"


@torch.no_grad()
def test_a_small_step_of_the_adapter_moves_the_merged_weight():
    """Smaller than half the spacing of most of its numbers."""
    built = layer(HALF, merges=0)
    built.adapter.choose("current")
    before = built.held.value(merged=True).clone()
    built.adapter.lora_B["current"].mul_(1 + 2**-10)
    assert torch.equal(built.held.value(merged=True), before), "it moved before it was chosen"
    built.adapter.choose("current")
    assert not torch.equal(built.held.value(merged=True), before)
