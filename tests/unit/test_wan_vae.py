"""The Wan VAE on tiny random weights: streaming, forking, loading."""

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

diffusers = pytest.importorskip("diffusers")

from megatron_kvpo.model.wan_vae import DecoderCache, WanVae, load_wan_vae  # noqa: E402

CHANNELS = 4
MEAN, STD = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 1.1, 2.0]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
             "latents_mean": MEAN, "latents_std": STD}  # fmt: skip
    return diffusers.AutoencoderKLWan(**(sizes | options)).eval()


@pytest.fixture(scope="module")
def theirs():
    return tiny()


@pytest.fixture(scope="module")
def vae(theirs):
    return WanVae(theirs)


@pytest.fixture
def latent():
    return torch.randn(2, 5, CHANNELS, 2, 3, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole_by_diffusers(theirs, latent_BFCHW):
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return theirs.decode((latent_BFCHW * std + mean).transpose(1, 2), return_dict=False)[0]


def test_shapes_follow_the_stride(vae):
    video = torch.rand(2, 3, 13, 16, 24) * 2 - 1
    latent = vae.encode(video)
    assert latent.shape == (2, 4, CHANNELS, 2, 3)
    assert vae.decode(latent)[0].shape == video.shape
    assert (vae.num_pixel_frames(1), vae.num_pixel_frames(4)) == (1, 13)
    pixels = vae.decode_pixels(latent * 50)
    assert pixels.shape == (2, 13, 3, 16, 24)
    assert 0 <= pixels.min() < pixels.max() <= 1


@torch.no_grad()
def test_encoding_is_the_normalised_mean_that_diffusers_finds(theirs, vae):
    video = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    mode = theirs.encode(video).latent_dist.mode()
    mean, std = torch.tensor(MEAN)[:, None, None, None], torch.tensor(STD)[:, None, None, None]
    torch.testing.assert_close(vae.encode(video).transpose(1, 2), (mode - mean) / std, **CLOSE)


@pytest.mark.parametrize("pieces", [(5,), (1, 1, 1, 1, 1), (3, 2), (1, 4)])
def test_streaming_equals_decoding_whole_by_diffusers(theirs, vae, latent, pieces):
    cache, parts = None, []
    for piece in latent.split(list(pieces), dim=1):
        part, cache = vae.decode(piece, cache)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole_by_diffusers(theirs, latent), **CLOSE)


def test_streams_side_by_side_do_not_meet(vae, latent):
    other = latent.flip(0) + 1
    alone = [vae.decode(x)[0][:, :, -8:] for x in (latent, other)]
    caches = [vae.decode(x[:, :3])[1] for x in (latent, other)]
    together = [vae.decode(x[:, 3:], c)[0] for x, c in zip((latent, other), caches, strict=True)]
    for part, whole in zip(together, alone, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=0)


def test_a_fork_continues_as_an_unforked_stream_bit_for_bit(vae, latent):
    prefix, tail = latent[:1, :3], latent[:1, 3:]
    _, cache = vae.decode(prefix)
    plain, _ = vae.decode(tail, cache)
    forked, _ = vae.decode(tail, cache.fork(1))
    selected, _ = vae.decode(tail, cache.select(torch.tensor([0])))
    again, _ = vae.decode(tail, cache)  # the first use left the cache as it was
    for other in (forked, selected, again):
        assert torch.equal(other, plain)


def test_branches_share_the_prefix_and_differ_after_it(vae, latent):
    tails = torch.randn(4, 2, CHANNELS, 2, 3)
    rows = torch.tensor([1, 0, 1, 1])
    _, cache = vae.decode(latent[:, :3])
    continued, _ = vae.decode(tails, cache.select(rows))
    whole, _ = vae.decode(torch.cat([latent[rows, :3], tails], dim=1))
    torch.testing.assert_close(continued, whole[:, :, -8:], **CLOSE)
    one = cache.select(slice(0, 1))
    shared, copied = one.fork(4), one.select(torch.zeros(4, dtype=torch.long))
    assert torch.equal(vae.decode(tails, shared)[0], vae.decode(tails, copied)[0])
    assert shared.num_bytes < copied.num_bytes == 4 * one.select(torch.tensor([0])).num_bytes


def test_decoded_branches_equal_whole_videos_and_decode_the_prefix_once(theirs, latent):
    branches = torch.cat([latent[:1, :3].expand(5, -1, -1, -1, -1), torch.randn(5, 2, 4, 2, 3)], 1)
    whole = WanVae(theirs).decode_pixels(branches)
    counted = 0

    def count(module, inputs):
        nonlocal counted
        counted += len(inputs[0]) * inputs[0].shape[2]

    handle = theirs.post_quant_conv.register_forward_pre_hook(count)
    try:
        for max_rows in (None, 2):
            counted = 0
            forked = WanVae(theirs, max_rows).decode_branches(branches, 3)
            torch.testing.assert_close(forked, whole, **CLOSE)
            assert counted == 3 + 5 * 2
    finally:
        handle.remove()
    every = WanVae(theirs).decode_branches(branches[:, :3], 3)
    torch.testing.assert_close(every, whole[:, :9], **CLOSE)


def test_rows_do_not_depend_on_their_batch(theirs, vae, latent):
    whole, cache = vae.decode(latent)
    narrow = WanVae(theirs, max_rows=1)
    video, parts = narrow.decode(latent)
    torch.testing.assert_close(video, whole, **CLOSE)
    more = torch.randn(2, 1, CHANNELS, 2, 3)
    torch.testing.assert_close(narrow.decode(more, parts)[0], vae.decode(more, cache)[0], **CLOSE)
    torch.testing.assert_close(narrow.encode(whole), vae.encode(whole), **CLOSE)


def test_the_module_keeps_no_state_of_a_stream(theirs, vae, latent):
    theirs.clear_cache()
    vae.decode(latent)
    vae.encode(torch.zeros(1, 3, 5, 16, 16))
    assert set(theirs._feat_map) | set(theirs._enc_feat_map) == {None}


def test_bad_shapes_are_refused(vae, latent):
    with pytest.raises(ValueError, match="4L-3"):
        vae.encode(torch.zeros(1, 3, 12, 16, 16))
    with pytest.raises(ValueError, match=r"\[B, F, 4, H, W\]"):
        vae.decode(latent[:, :, :3])
    _, cache = vae.decode(latent)
    with pytest.raises(ValueError, match="2 rows for 1"):
        vae.decode(latent[:1], cache)
    with pytest.raises(ValueError, match="select one first"):
        cache.fork(3)
    with pytest.raises(ValueError, match="first 2 latent frames"):
        vae.decode_branches(latent, 2)
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\]"):
        vae.decode_branches(latent, 6)
    with pytest.raises(ValueError, match="max_rows 0"):
        WanVae(tiny(), 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperal_downsample": [True, True, True]}, "temporal stride 8"),
        ({"latents_mean": [0.0]}, "latents_mean 1, not 4"),
        ({"is_residual": True}, "is_residual True"),
        ({"patch_size": 2, "in_channels": 12, "out_channels": 12}, "patch_size 2"),
    ],
)
def test_other_vaes_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        WanVae(tiny(**options))


@pytest.mark.parametrize("inner", [".", "vae"])
def test_a_saved_folder_loads_to_the_same_vae(theirs, vae, latent, tmp_path, inner):
    theirs.save_pretrained(tmp_path / inner)
    loaded = load_wan_vae(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.decode(latent)[0], vae.decode(latent)[0])
    narrow = load_wan_vae(tmp_path)
    assert narrow.dtype == torch.bfloat16
    assert narrow.decode_pixels(latent).dtype == torch.float32
    difference = narrow.decode_pixels(latent) - vae.decode_pixels(latent)
    assert 0 < difference.abs().max() < 0.05


def test_faulty_folders_are_refused(theirs, tmp_path):
    with pytest.raises(ValueError, match="holds no Wan VAE"):
        load_wan_vae(tmp_path)
    theirs.save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    state = load_file(weights)
    name = "decoder.conv_in.weight"
    save_file({n: t for n, t in state.items() if n != name}, weights)
    with pytest.raises(ValueError, match=f"1 missing .*{name}"):
        load_wan_vae(tmp_path)
    save_file(state | {"stray": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"1 unknown tensors .*stray"):
        load_wan_vae(tmp_path)
    save_file(state | {name: torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=rf"{name} \[1\] instead of"):
        load_wan_vae(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="only safetensors"):
        load_wan_vae(tmp_path)
    config.write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="holds no Wan VAE"):
        load_wan_vae(tmp_path)


def original_names() -> Iterator[str]:
    """Every name that a file of Wan's own may hold, and some that it does not."""
    residual = ["residual.0.gamma", "residual.3.gamma"] + [
        f"{part}.{kind}"
        for part in ("residual.2", "residual.6", "shortcut", "resample.1", "time_conv")
        for kind in ("weight", "bias")
    ]
    yield from (f"conv{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias"))
    for side, blocks in (("encoder", "downsamples"), ("decoder", "upsamples")):
        yield f"{side}.head.0.gamma"
        yield from (f"{side}.{n}.{k}" for n in ("conv1", "head.2") for k in ("weight", "bias"))
        yield from (f"{side}.middle.{n}.{part}" for n in (0, 2) for part in residual)
        yield f"{side}.middle.1.norm.gamma"
        yield from (f"{side}.middle.1.{n}.{k}" for n in ("to_qkv", "proj")
                    for k in ("weight", "bias"))  # fmt: skip
        yield from (f"{side}.{blocks}.{n}.{part}" for n in range(15) for part in residual)


def test_wans_own_file_loads_to_the_same_vae(tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(base_dim=8).eval()
    state = theirs.state_dict()
    renamed = convert_wan_vae_to_diffusers({name: name for name in original_names()})
    assert state.keys() <= renamed.keys()
    original = {renamed[name]: tensor for name, tensor in state.items()}
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    latent = torch.randn(1, 2, 16, 2, 2)
    loaded = load_wan_vae(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.decode(latent)[0], WanVae(theirs).decode(latent)[0])
    del original["conv2.bias"]
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match=r"1 missing .*post_quant_conv\.bias"):
        load_wan_vae(tmp_path)
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="could run code"):
        load_wan_vae(tmp_path)


def test_a_cache_of_nothing_but_marks_has_no_rows_to_share():
    cache = DecoderCache(features=(None, torch.zeros(3, 1), "Rep"))
    assert cache.num_rows == 3
    assert cache.select(torch.tensor([2])).features[0] is None
    assert cache.select(slice(1, 3)).features[2] == "Rep"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_come_for_the_call_and_leave(theirs, latent):
    held = WanVae(theirs)
    on_gpu = held.decode_pixels(latent.cuda())
    assert on_gpu.is_cuda
    assert {p.device.type for p in theirs.parameters()} == {"cpu"}
    torch.testing.assert_close(on_gpu.cpu(), held.decode_pixels(latent), rtol=1e-2, atol=1e-2)
