"""What runs on a GPU without a graph: kernels are their formulas, captured passes the passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.model import fused
from megatron_kvpo.model.eight_bits import KINDS
from megatron_kvpo.model.fused import FP8, EightBits, Form
from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.parallel.groups import Ranks, start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from tests.gpu import test_one_gpu
from tests.unit import small, test_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLOSE, far = test_one_gpu.CLOSE, test_one_gpu.far
_alone = test_one_gpu._a_process_without_cpu_ranks

EPS, ROWS, TOKENS = 1e-6, 3, 7
SIZES = pytest.mark.parametrize("dim", [48, 1536])
TYPES = pytest.mark.parametrize("dtype", list(CLOSE), ids=str)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield start_ranks(ParallelConfig(timeout_s=120), "cuda")
    stop_ranks()


@pytest.fixture(autouse=True)
def _without_a_graph() -> Iterator[None]:
    with torch.no_grad():
        yield


def drawn(dtype: torch.dtype, *shape: int, name: str) -> Tensor:
    """In this type's numbers, on the CPU; tokens of very different size."""
    sizes = torch.logspace(-2, 2, shape[0]) if shape[0] == TOKENS else torch.ones(shape[0])
    return (noise(shape, name) * sizes.view(-1, *[1] * (len(shape) - 1))).to(dtype)


def exact(value: object) -> object:
    return value.double() if isinstance(value, Tensor) else value


def on_gpu(value: object) -> object:
    """Its strides, too."""
    if not isinstance(value, Tensor):
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return there.copy_(value)


def check_tokens(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Token by token, each over its own largest value."""
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    for ours, theirs in zip(found, wanted, strict=True):
        assert far(ours, theirs) < CLOSE[dtype]


def check_eight(tokens: Tensor, unit: Tensor, whole: Tensor) -> None:
    """Bits and units are those of a CPU, but for what lies between two numbers."""
    wanted, unit_R1 = fused.quantise_rows(whole.cpu(), FP8)
    torch.testing.assert_close(unit.cpu(), unit_R1, rtol=1e-6, atol=0)
    ours, theirs = tokens.cpu().float(), wanted.float()
    torch.testing.assert_close(ours, theirs, rtol=2**-3, atol=2**-9)
    assert (ours != theirs).float().mean() < 1e-2


def modulation(kind: str, dtype: torch.dtype, dim: int) -> tuple[Tensor, ...]:
    """Shift, scale and gate as a block has them: rows of a tensor of six, or a norm's own."""
    if kind == "own":
        gate = drawn(dtype, 1, ROWS, dim, name="gate")
        return drawn(dtype, dim, name="shift"), drawn(dtype, dim, name="scale"), gate
    length = TOKENS if kind == "token" else 1
    six = drawn(torch.float32, length, ROWS, 6, dim, name="modulation").clamp(-3, 3)
    return six.to(dtype).unbind(2)[1:4]


FORMS = {
    "plain": Form(), "margin": Form(margin=16), "eight": Form(eight_bits=True),
    "only eight": Form(eight_bits=True, whole=False),
}  # fmt: skip


@SIZES
@TYPES
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("kind", ["token", "shared", "own"])
def test_sum_and_norm_are_the_formula_in_every_form(kind, form, dtype, dim):
    """Without an update, with one, and with one through a gate."""
    x, update = (drawn(dtype, TOKENS, ROWS, dim, name=name) for name in ("x", "update"))
    shift, scale, gate = modulation(kind, dtype, dim)
    wanted_form = FORMS[form]
    for change in ((None, None), (update, None), (update, gate)):
        values, plus_one = (x, *change, shift, scale), kind != "own"
        wanted = fused.residual_norm(*map(exact, values), EPS, plus_one=plus_one)
        total, normed = fused.residual_norm(
            *map(on_gpu, values), EPS, plus_one=plus_one, form=wanted_form
        )
        check_tokens(total, wanted[0], dtype)
        if not wanted_form.eight_bits:
            assert normed.shape[-1] == dim + wanted_form.margin
            check_tokens(normed[..., :dim], wanted[1], dtype)
            continue
        assert isinstance(normed, EightBits)
        assert (normed.shape, normed.dtype) == ((TOKENS, ROWS, dim), dtype)
        assert (normed.whole_RD is not None) == wanted_form.whole
        if normed.whole_RD is None:
            back = normed.tokens_RD.float() * normed.unit_R1
            assert far(back.view(wanted[1].shape), wanted[1]) < 2**-4
        else:
            check_tokens(normed.whole_RD.view(wanted[1].shape), wanted[1], dtype)
            check_eight(normed.tokens_RD, normed.unit_R1, normed.whole_RD)


@SIZES
@TYPES
@pytest.mark.parametrize("kind", ["token", "shared", None])
def test_a_residual_is_the_sum_through_its_gate(kind, dtype, dim):
    x, update = (drawn(dtype, TOKENS, ROWS, dim, name=name) for name in ("x", "update"))
    gate = None if kind is None else modulation(kind, dtype, dim)[2]
    found = fused.gated_add(on_gpu(x), on_gpu(update), on_gpu(gate))
    check_tokens(found, fused.gated_add(exact(x), exact(update), exact(gate)), dtype)


@SIZES
@TYPES
@pytest.mark.parametrize("share", [1, 2])
def test_rms_norms_are_the_formula_turned_or_not(share, dtype, dim):
    """With the sum over all features given, where a rank holds a share of them."""
    x, weight = drawn(dtype, TOKENS, ROWS, dim, name="x"), drawn(dtype, dim, name="weight")
    total = None if share == 1 else share * x.float().square().sum(-1, keepdim=True) + 0.5
    phase = noise((TOKENS, 8), "phase")
    table = torch.stack([phase.cos(), phase.sin()])
    values = (on_gpu(x), on_gpu(total), on_gpu(weight))
    found = fused.rms_scaled(*values, share * dim, EPS)
    check_tokens(found, fused.rms_scaled(exact(x), total, exact(weight), share * dim, EPS), dtype)
    found = fused.rms_rotated(*values, on_gpu(table), share * dim, EPS)
    assert found.shape == (TOKENS, ROWS, dim // 16, 16)
    check_tokens(
        found, fused.rms_rotated(exact(x), total, exact(weight), table, share * dim, EPS), dtype
    )


@TYPES
@pytest.mark.parametrize("page", [(4, 2, 8), (40, 4, 64)], ids=["small", "large"])
def test_pages_and_own_tokens_are_joined_however_the_own_ones_lie(page, dtype):
    tokens, heads, size = page
    pages = drawn(dtype, 6, *page, name="pages").cuda()
    table = torch.tensor([[3, 0, 5], [5, 5, 1]], device="cuda")
    ways = {
        "rows first": drawn(dtype, 2, 5, heads, size, name="own").cuda(),
        "tokens first": drawn(dtype, 5, 2, heads, size, name="own").cuda().transpose(0, 1),
        "the newest": drawn(dtype, 9, 2, heads, size, name="own").cuda().transpose(0, 1)[:, 4:],
        "heads apart": drawn(dtype, 2, 5, size, heads, name="own").cuda().transpose(2, 3),
    }
    for way, own in ways.items():
        joined = fused.joined(pages, table, own)
        for row, numbers in enumerate(table.tolist()):
            expected = torch.cat([*(pages[n] for n in numbers), own[row]])
            assert joined[row].shape == (3 * tokens + 5, heads, size)
            assert torch.equal(joined[row], expected), way


@SIZES
@TYPES
def test_rows_in_8_bits_are_a_cpus_also_of_a_wider_tensor(dtype, dim):
    x = drawn(dtype, TOKENS, dim + 16, name="x")
    x[2] = 0
    check_eight(*fused.quantise_rows(x[:, :dim].contiguous().cuda(), FP8), x[:, :dim])
    check_eight(*fused.quantise_rows(x.cuda()[:, :dim], FP8), x[:, :dim])


@SIZES
@TYPES
def test_gelu_is_the_formula_in_8_bits_and_beside_them(dtype, dim):
    x = drawn(dtype, TOKENS, ROWS, dim, name="x")
    wanted = torch.nn.functional.gelu(x.double(), approximate="tanh")
    check_tokens(fused.gelu_in(x.cuda(), Form(margin=16)), wanted, dtype)
    found = fused.gelu_in(x.cuda(), Form(eight_bits=True))
    check_tokens(found.whole_RD.view(x.shape), wanted, dtype)
    check_eight(found.tokens_RD, found.unit_R1, found.whole_RD)
    only = fused.gelu_in(x.cuda(), Form(eight_bits=True, whole=False))
    assert only.whole_RD is None
    assert torch.equal(only.tokens_RD.float(), found.tokens_RD.float())
    assert torch.equal(only.unit_R1, found.unit_R1)


@TYPES
@pytest.mark.parametrize("gelu", [False, True], ids=["", "gelu"])
def test_a_layer_with_its_adapter_in_the_margins_is_the_formula(gelu, dtype):
    built, x = test_product.layer(dtype), noise((2, 3, test_product.IN), "x").to(dtype)
    exact_of = {slot: built.expected(x, slot) for slot in ("current", "old", None)}
    for parameter in (built.weight, built.bias, *built.adapter.parameters()):
        parameter.data = parameter.data.cuda()
    built.adapter.place_up(built.held.make_margin(test_product.RANK))
    roomy = torch.nn.functional.pad(x.cuda(), (0, test_product.RANK), value=torch.nan)
    for slot, wanted in exact_of.items():
        built.adapter.choose(slot)
        if gelu:
            wanted = torch.nn.functional.gelu(wanted, approximate="tanh")
        for tokens in (x.cuda(), *([] if slot is None else [roomy])):
            assert far(built.out(tokens, gelu=gelu), wanted) < CLOSE[dtype]


def eight_bits(scaling: str) -> None:
    """Skip where this product in 8 bits cannot run."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that multiplies in 8 bits")
    if scaling == "block":
        pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)


@pytest.mark.parametrize("scaling", list(KINDS))
def test_a_product_in_8_bits_is_near_the_plain_one_and_row_by_row(scaling):
    """37 rows, which Transformer Engine takes padded; refilled, it is one of the new weight."""
    eight_bits(scaling)
    weight, second = (noise((384, 256), name).bfloat16().cuda() for name in ("weight", "second"))
    x, bias = noise((37, 256), "x").bfloat16().cuda(), noise((384,), "bias").bfloat16().cuda()
    held = KINDS[scaling](weight.clone())
    out = held.times(x, bias)
    plain = x.double() @ weight.double().t() + bias.double()
    assert out.dtype == torch.bfloat16
    assert 1e-3 < float((out.double() - plain).norm() / plain.norm()) < 5e-2
    other = x.clone()
    other[5] = 1e3
    same = (held.times(other, bias) == out).all(1)
    assert same.tolist() == [row != 5 for row in range(37)]
    held.refill(second)
    assert torch.equal(held.times(x, bias), KINDS[scaling](second).times(x, bias))


@pytest.mark.parametrize("scaling", list(KINDS))
def test_a_model_in_8_bits_is_near_the_bfloat16_one_and_row_by_row(ranks, scaling):
    eight_bits(scaling)
    wide = ("device=cuda", "model.dtype=bfloat16", "model.hidden_dim=256", "model.ffn_dim=384")
    families = ("model.fp8=[ffn,attention,text]", f"model.fp8_scaling={scaling}")
    found = []
    for overrides in ((), families):
        tiny = small.build(ranks, *wide, *overrides)
        tiny.stir("current", size=0.05)
        stream = tiny.streamed(12, 3, tiny.text(*small.TEXTS))
        noisy = tiny.latents(3, 3, "noisy")
        with tiny.policy.acting("current"):
            found.append(stream.velocity(noisy, 0.9375))
            other = noisy.clone()
            other[1] *= 50
            same = (stream.velocity(other, 0.9375) == found[-1]).flatten(1).all(1)
        assert same.tolist() == [True, False, True]
    assert 1e-3 < float((found[1] - found[0]).norm() / found[0].norm()) < 0.1


def passes(tiny: small.Small) -> list[Tensor]:
    """Passes of few kinds, many of each: other latents, times, routes, pages, texts and slots."""
    found = []
    routes = [[(3, 5, 6, 8, 9), ()], [(), (4, 5, 6, 7, 9)]]
    for slot in ("current", "old", "current", None):
        with tiny.policy.bank.use(slot):
            stream = tiny.streamed(15, 2, tiny.text(*small.TEXTS[:2]))
            for number, routed in enumerate((None, *routes, None)):
                noisy = tiny.latents(3, 2, f"noisy {number}")
                found.append(stream.velocity(noisy, 0.9 - 0.2 * number, routed))
            stream.text = tiny.text(*small.TEXTS[1:])
            for number in range(3):
                found.append(stream.velocity(tiny.latents(3, 2, "noisy"), 0.5))
                stream.commit(tiny.latents(3, 2, f"clean {number}"))
                pages = [row.lookup(range(stream.frame - 3, stream.frame)) for row in stream.tables]
                found.append(tiny.world.pool.key[:, pages].clone())
            found.append(stream.velocity(tiny.latents(3, 2, "noisy"), 0.5))
            stream.release()
        tiny.stir("current", size=0.02)  # in place; it acts when it is next chosen
    return found


EIGHT = ("model.dtype=bfloat16", "model.fp8=[ffn,attention,text]")
WAYS = [(), ("model.dtype=bfloat16",), ("policy.merge=true",), EIGHT, (*EIGHT, "policy.merge=true"),
        ("memory.bank_frames=2", "memory.sparse=true", "memory.sparse_frames=3")]  # fmt: skip


@pytest.mark.parametrize("overrides", WAYS, ids=" ".join)
def test_captured_passes_are_the_plain_ones_bit_for_bit(ranks, overrides):
    if "model.fp8=[ffn,attention,text]" in overrides:
        eight_bits("row")
    found, graphs = [], []
    for rows in (0, 2):
        tiny = small.build(ranks, "device=cuda", f"model.cuda_graph_rows={rows}", *overrides)
        tiny.stir("current", "old", size=0.05)
        found.append(passes(tiny))
        graphs.append(len(tiny.model._captured._captures))
    plain, captured = found
    assert graphs[0] == 0
    assert graphs[1] >= 6, "a read and a write of each of three policies"
    for number, (ours, theirs) in enumerate(zip(captured, plain, strict=True)):
        assert torch.equal(ours, theirs), f"pass {number}"
    each = len(plain) // 4
    assert not any(torch.equal(plain[0], other) for other in plain[1:4])
    assert not torch.equal(plain[0], plain[2 * each]), "the slot's new values do not matter"


def test_passes_of_one_shape_that_see_other_frames_are_captured_apart(ranks):
    """Own frames hidden from themselves; a few of the memory's, each head its best."""
    seen = [{}, {"own_from": 1}, {"num_memory": 6, "num_chosen": 2},
            {"num_memory": 6, "num_chosen": 4}, {"num_memory": 4, "num_chosen": 2}]  # fmt: skip
    found = []
    for rows in (0, 2):
        tiny = small.build(ranks, "device=cuda", f"model.cuda_graph_rows={rows}")
        stream = tiny.streamed(9)
        read = torch.tensor([stream.tables[0].lookup(range(8))], device="cuda")
        pages = [PassPages(tiny.world.pool, read, **how) for how in seen]
        time, noisy = torch.full((1, 1), 500.0, device="cuda"), tiny.latents(3)
        turns = [[tiny.model(noisy, time, range(9, 12), stream.text, p) for p in pages]
                 for _ in range(3)]  # fmt: skip
        found.append(turns)
    for turn in found[1]:
        assert all(torch.equal(a, b) for a, b in zip(turn, found[0][0], strict=True))
    assert len({float(out.double().norm()) for out in found[0][0]}) == len(seen)


def test_more_rows_than_the_setting_says_are_not_captured(ranks):
    tiny = small.build(ranks, "device=cuda", "model.cuda_graph_rows=2")
    stream = tiny.streamed(12, rows=3)
    for _ in range(3):
        stream.velocity(tiny.latents(3, 3), 0.5)
    assert not tiny.model._captured._captures
    stream.release()
