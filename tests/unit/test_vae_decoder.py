"""The VAE decoder's own forward: what diffusers computes, in any split, from shared caches."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from megatron_kvpo.model import vae_decoder  # noqa: E402
from megatron_kvpo.model.vae_decoder import latents_at_once  # noqa: E402
from megatron_kvpo.model.wan_vae import DecoderCache, WanVae  # noqa: E402

CHANNELS, LATENTS = 4, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def uneven(**options):
    """A decoder with every kind of layer, shortcuts of other widths too; no gamma or bias is 1."""
    sizes = {"base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
             "latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    vae = diffusers.AutoencoderKLWan(**(sizes | options)).eval().requires_grad_(False)
    for name, weight in vae.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator)
        scale = (2 / weight[0].numel()) ** 0.5 if weight.ndim > 3 else 0.3
        weight.copy_(1 + drawn / 3 if name.endswith("gamma") else drawn * scale)
    return vae


@pytest.fixture(scope="module")
def theirs():
    return uneven()


@pytest.fixture(params=[(), (8, 16, 32), (32,)], ids=["in time", "in space", "both"])
def layout(request, monkeypatch):
    """Which widths' convolutions have three frames side by side."""
    monkeypatch.setattr(vae_decoder, "SIDE_BY_SIDE", frozenset(request.param))


@pytest.fixture(scope="module")
def vae(theirs):
    return WanVae(theirs)


@pytest.fixture(scope="module")
def latent():
    return torch.randn(2, LATENTS, CHANNELS, 3, 2, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def raw(theirs, latent):
    """Without the last clamp, which would hide what is far off."""
    hidden, slots, parts = theirs.post_quant_conv(latent.transpose(1, 2)), [None] * 99, []
    for frame in torch.split(hidden, 1, dim=2):
        parts.append(theirs.decoder(frame, feat_cache=slots, feat_idx=[0]))
    return torch.cat(parts, dim=2)


@torch.no_grad()
def streamed(theirs, latent, pieces, cache=None):
    slots = list(cache.features) if cache else [None] * 99
    hidden, parts = theirs.post_quant_conv(latent.transpose(1, 2)), []
    for piece in torch.split(hidden, pieces, dim=2):
        for part in torch.split(piece, latents_at_once(piece.shape[2], slots, 1), dim=2):
            parts.append(
                vae_decoder.decode_latents(theirs.decoder, part.permute(0, 2, 3, 4, 1), slots)
            )
    return torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3), DecoderCache(features=tuple(slots))


@pytest.mark.parametrize("pieces", [(8,), (1,) * 8, (1, 7), (3, 5), (2, 1, 4, 1), (1, 2, 5)])
@pytest.mark.usefixtures("layout")
def test_any_split_is_what_diffusers_decodes_and_leaves_the_same_cache(
    theirs, vae, latent, pieces
):  # fmt: skip
    expected, reference = raw(theirs, latent), streamed(theirs, latent, [8])[1].features
    found, cache = streamed(theirs, latent, list(pieces))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, **CLOSE)
    for feature, other in zip(cache.features, reference, strict=True):
        if not isinstance(feature, torch.Tensor):
            assert feature == other
        else:
            torch.testing.assert_close(feature, other, **CLOSE)
    torch.testing.assert_close(
        torch.cat([vae.decode(latent[:, :5])[0], vae.decode(latent)[0][:, :, 17:]], dim=2),
        expected.clamp(-1, 1), **CLOSE,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)])
@pytest.mark.usefixtures("layout")
def test_one_row_of_the_smallest_sizes(theirs, vae, size):
    small = torch.randn(1, 3, CHANNELS, *size)
    torch.testing.assert_close(vae.decode(small)[0], raw(theirs, small).clamp(-1, 1), **CLOSE)


@pytest.mark.parametrize("order", [[False, True, True], [True, False, True]])
@pytest.mark.usefixtures("layout")
def test_upsampling_in_time_may_come_at_any_stage(order, latent):
    other = uneven(temperal_downsample=order)
    expected = raw(other, latent).clamp(-1, 1)
    torch.testing.assert_close(WanVae(other).decode(latent)[0], expected, **CLOSE)


def test_a_cache_of_one_latent_holds_zeros_marks_and_that_latent(theirs, latent):
    _, cache = streamed(theirs, latent[:, :1], [1])
    marks = [f for f in cache.features if isinstance(f, str)]
    features = [f for f in cache.features if isinstance(f, torch.Tensor)]
    assert marks == ["Rep", "Rep"]
    assert {f.shape[:2] for f in features} == {(2, 2)}
    assert all((f[:, 0] == 0).all() and (f[:, 1] != 0).any() for f in features)


@pytest.mark.usefixtures("layout")
def test_no_cache_is_written_and_none_holds_more_than_its_frames(vae, latent):
    for length in (1, 2, 5):
        cache = vae.decode(latent[:1, :length])[1]
        held = [f for f in cache.features if isinstance(f, torch.Tensor)]
        assert cache.num_bytes == sum(f.numel() * f.element_size() for f in held)
        shared = cache.fork(3)
        before = [f.clone() for f in held]
        tails = torch.randn(3, 4, *latent.shape[2:])
        together, end = vae.decode(tails, shared)
        assert all(torch.equal(f, b) for f, b in zip(held, before, strict=True))
        again, _ = vae.decode(tails, cache.select(torch.tensor([0, 0, 0])))
        assert torch.equal(together, again)
        assert not {f.data_ptr() for f in held} & {
            f.data_ptr() for f in end.features if isinstance(f, torch.Tensor)
        }


def test_a_video_begins_alone_and_goes_on_three_latents_at_a_time(theirs, latent):
    begun = [torch.zeros(1)]
    assert latents_at_once(1, [None], 1) == [1]
    assert latents_at_once(5, [None], 1) == [1, 3, 1]
    assert latents_at_once(7, begun, 1) == [3, 3, 1]
    assert latents_at_once(3, begun, 1) == [3]
    assert latents_at_once(3, begun, 2) == latents_at_once(3, begun, 9) == [1, 1, 1]
    hidden = latent.permute(0, 1, 3, 4, 2)
    with pytest.raises(ValueError, match="not with 7 more"):
        vae_decoder.decode_latents(theirs.decoder, hidden, [None] * 99)


def test_norm_and_sum_are_those_of_diffusers(theirs):
    block = theirs.decoder.up_blocks[1].resnets[0]
    wide = len(block.conv1.bias)
    x = torch.randn(2, 3, 4, 5, wide)
    x[0, 0, 0, 0] = -block.conv1.bias  # the norm of nothing is 0, not a NaN
    out = torch.empty(2, 5, 4, 5, wide)
    gamma = block.norm2.gamma.flatten()
    vae_decoder.norm(x, gamma, block.conv1.bias, [out[:, 2:]], silu=True)
    theirs_in = (x + block.conv1.bias).movedim(-1, 1)
    expected = block.nonlinearity(block.norm2(theirs_in)).movedim(1, -1)
    torch.testing.assert_close(out[:, 2:], expected, **CLOSE)
    assert (out[0, 2, 0, 0] == 0).all()
    vae_decoder.norm(x, gamma, None, [out[:, 2:]], silu=False)
    torch.testing.assert_close(
        out[:, 2:], block.norm2(x.movedim(-1, 1)).movedim(1, -1), **CLOSE
    )  # fmt: skip
    total = vae_decoder.add_(x.clone(), block.conv2.bias, expected)
    torch.testing.assert_close(total, x + block.conv2.bias + expected, **CLOSE)


@pytest.mark.usefixtures("layout")
def test_bfloat16_is_near_float32_and_no_farther_than_diffusers(theirs, latent):
    exact = raw(theirs, latent)
    narrow = uneven().to(torch.bfloat16)
    vae_decoder.arrange(narrow.decoder)
    ours = streamed(narrow, latent.bfloat16(), [8])[0].float() - exact
    other = raw(narrow, latent.bfloat16()).float() - exact
    assert 0 < ours.square().mean().sqrt() < 0.03 * exact.std()
    assert ours.square().mean() < 1.3 * other.square().mean()


def kernels(theirs):
    return [p for p in theirs.decoder.parameters() if p.ndim > 3 and p[0].numel() > p.shape[1]]


def channels_last(weight):
    layout = torch.channels_last_3d if weight.ndim == 5 else torch.channels_last
    return weight.is_contiguous(memory_format=layout)


def test_weights_lie_channels_last_and_moving_them_keeps_that(vae, theirs):
    places = {name: p.data_ptr() for name, p in theirs.named_parameters()}
    assert any(weight is theirs.decoder.conv_in.weight for weight in kernels(theirs))
    for weight in kernels(theirs):
        assert channels_last(weight)
        assert not weight.is_contiguous()
        assert channels_last(weight.to("meta"))
    WanVae(theirs).decode(torch.zeros(1, 2, CHANNELS, 1, 1))
    assert places == {name: p.data_ptr() for name, p in theirs.named_parameters()}


def places_in(shape, dtype):
    """Memory, and where `norm` is to write: behind two kept frames, or thrice side by side."""
    rows, frames, height, width, dim = shape
    plain = torch.full((rows, frames + 2, height, width, dim), 5.0, dtype=dtype)
    wide = torch.full((rows, frames, height, width, 3, dim), 5.0, dtype=dtype)
    return (
        (plain, lambda m: [m[:, 2:]]),
        (wide, lambda m: [m[:, j:, :, :, 2 - j] for j in range(3)]),
    )


@pytest.mark.gpu
@on_gpu
@TYPES
@pytest.mark.parametrize("dim", [16, 96, 192, 384])
def test_kernels_are_their_formulas(dtype, dim):
    """Rows that lie apart, sizes that fill no tile, pixels of zeros and of very different size."""
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 8e-3}
    generator = torch.Generator().manual_seed(2)
    sizes = torch.logspace(-3, 3, 5)[:, None]
    x = (torch.randn(3, 4, 7, 5, dim, generator=generator) * sizes).to(dtype)
    x[0, 0, 0, 0] = 0
    gamma, bias = torch.randn(2, dim, generator=generator).to(dtype)
    shortcut = torch.randn(x.shape, generator=generator).to(dtype)
    for added in (None, bias):
        there = None if added is None else added.cuda()
        for silu in (True, False):
            for out, places in places_in(x.shape, dtype):
                found = out.cuda()
                vae_decoder.norm(x, gamma, added, places(out), silu=silu)
                vae_decoder.norm(x.cuda(), gamma.cuda(), there, places(found), silu=silu)
                torch.testing.assert_close(found.cpu(), out, **close)
        total = vae_decoder.add_(x.clone(), added, shortcut)
        torch.testing.assert_close(
            vae_decoder.add_(x.cuda(), there, shortcut.cuda()).cpu(), total, **close
        )


@pytest.mark.gpu
@on_gpu
@TYPES
@pytest.mark.usefixtures("layout")
@torch.no_grad()
def test_decoding_on_a_gpu_is_decoding_on_the_cpu(theirs, latent, dtype):
    """From a shared prefix on, too. Convolutions may run in TF32."""
    held = WanVae(uneven().to(dtype))
    limit = 1e-2 if dtype == torch.float32 else 5e-2
    prefix, tails = latent[:1, :2], latent[:, 2:]
    for move in (lambda x: x.cpu(), lambda x: x.cuda()):
        begun, cache = held.decode(move(prefix))
        tail, _ = held.decode(move(tails), cache.fork(2))
        rows = torch.cat([prefix.expand(2, -1, -1, -1, -1), tails], dim=1)
        expected = raw(theirs, rows).clamp(-1, 1)
        assert tail.device.type == begun.device.type == move(tails).device.type
        found = torch.cat([begun.expand(2, -1, -1, -1, -1), tail], dim=2)
        assert (found.cpu().float() - expected).square().mean().sqrt() < limit * expected.std()
    with held.resident("cuda"):
        assert all(weight.is_cuda and channels_last(weight) for weight in kernels(held._vae))
    assert {p.device.type for p in held._vae.parameters()} == {"cpu"}
