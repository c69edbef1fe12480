"""The shapes codec: causal, streaming, cheap, and fitted."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kvpo.config import CodecConfig
from megatron_kvpo.model.codec import ShapesCodec, load_codec, save_codec
from megatron_kvpo.training.codec_fit import fit_codec, psnr

CHANNELS = 16


@pytest.fixture
def codec() -> ShapesCodec:
    torch.manual_seed(0)
    made = ShapesCodec(CodecConfig(), CHANNELS).eval()
    made.latents_mean.uniform_(-1, 1)
    made.latents_std.uniform_(0.5, 2)
    return made.requires_grad_(False)


def test_shapes_follow_wan_stride(codec):
    video = torch.rand(2, 3, 13, 32, 32) * 2 - 1
    latent = codec.encode(video)
    assert latent.shape == (2, 4, CHANNELS, 8, 8)
    assert codec.decode(latent)[0].shape == video.shape
    assert codec.num_pixel_frames(4) == 13
    pixels = codec.decode_pixels(latent * 50)
    assert pixels.shape == (2, 13, 3, 32, 32)
    assert pixels.min() == 0
    assert pixels.max() == 1


def test_encoder_sees_current_pixel_frames_only(codec):
    video = torch.rand(1, 3, 13, 32, 32)
    latent = codec.encode(video)
    for frame in range(13):
        changed = video.clone()
        changed[:, :, frame] += 0.5
        moved = (codec.encode(changed) != latent).any(dim=(0, 2, 3, 4)).nonzero().flatten().tolist()
        assert moved == [(frame + 3) // 4]


def test_decoder_sees_current_and_past_only(codec):
    latent = torch.randn(1, 5, CHANNELS, 8, 8)
    video, _ = codec.decode(latent)
    for frame in range(5):
        changed = latent.clone()
        changed[:, frame] += 1
        moved = (codec.decode(changed)[0] != video).any(dim=(0, 1, 3, 4)).nonzero().flatten()
        assert moved.min() == max(0, 4 * frame - 3)


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1), (3, 3), (1, 5), (4, 2)])
def test_decoding_in_pieces_equals_decoding_whole(codec, pieces):
    latent = torch.randn(2, 6, CHANNELS, 8, 8)
    whole, _ = codec.decode(latent)
    cache, parts = None, []
    for piece in latent.split(list(pieces), dim=1):
        part, cache = codec.decode(piece, cache)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-5, atol=1e-5)


def test_a_forked_cache_continues_each_row_with_its_own_past(codec):
    prefix, tails = torch.randn(2, 3, CHANNELS, 8, 8), torch.randn(4, 2, CHANNELS, 8, 8)
    rows = torch.tensor([1, 0, 1, 1])
    _, cache = codec.decode(prefix)
    continued, _ = codec.decode(tails, cache.select(rows))
    whole, _ = codec.decode(torch.cat([prefix[rows], tails], dim=1))
    torch.testing.assert_close(continued, whole[:, :, -8:], rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_their_batch(codec):
    latent = torch.randn(3, 2, CHANNELS, 8, 8)
    alone = torch.cat([codec.decode(row[None])[0] for row in latent])
    torch.testing.assert_close(codec.decode(latent)[0], alone, rtol=1e-5, atol=1e-5)


def test_budget_of_parameters_and_decoding(codec):
    assert sum(p.numel() for p in codec.parameters()) <= 300_000
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        codec.decode(torch.randn(1, 10, CHANNELS, 8, 8))
    assert counter.get_total_flops() / 10 <= 21e6


@pytest.mark.parametrize("shape", [(1, 3, 12, 32, 32), (1, 3, 13, 30, 32), (1, 4, 13, 32, 32)])
def test_videos_that_do_not_divide_are_refused(codec, shape):
    with pytest.raises(ValueError, match="4L-3, 4h, 4w"):
        codec.encode(torch.zeros(shape))


def test_latents_of_another_width_are_refused(codec):
    with pytest.raises(ValueError, match=r"these are \[1, 2, 8, 8, 8\]"):
        codec.decode(torch.zeros(1, 2, 8, 8, 8))


def test_saved_codecs_come_back_bit_for_bit(codec, tmp_path):
    file = tmp_path / "sub" / "codec.safetensors"
    save_codec(codec, file)
    back = load_codec(CodecConfig(weights=file), CHANNELS)
    for name, tensor in codec.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_foreign_files_are_refused_by_name(codec, tmp_path):
    file = tmp_path / "codec.safetensors"
    with pytest.raises(ValueError, match="no codec at"):
        load_codec(CodecConfig(weights=file), CHANNELS)
    file.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_codec(CodecConfig(weights=file), CHANNELS)
    save_codec(codec, file)
    with pytest.raises(ValueError, match=r"of another size \['decoder.0.weight"):
        load_codec(CodecConfig(weights=file), 8)
    state = load_file(file)
    state["blocks.0.weight"] = state.pop("latents_mean")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"1 unknown .*blocks.0.weight.*1 missing .*latents_mean"):
        load_codec(CodecConfig(weights=file), CHANNELS)


def squares(number: int, frames: int = 17) -> torch.Tensor:
    """uint8 [N, F, 32, 32, 3]: a coloured square that drifts right."""
    draw = torch.Generator().manual_seed(0)
    videos = torch.full((number, frames, 32, 32, 3), 30, dtype=torch.uint8)
    for video in videos:
        x, y = torch.randint(0, 14, (2,), generator=draw).tolist()
        colour = torch.randint(100, 255, (3,), generator=draw).to(torch.uint8)
        for frame in range(frames):
            video[frame, y : y + 10, x + frame // 2 : x + frame // 2 + 10] = colour
    return videos


@pytest.fixture(scope="module")
def fitted() -> tuple[ShapesCodec, dict[str, list[float]]]:
    torch.manual_seed(0)
    made = ShapesCodec(CodecConfig(width=32), CHANNELS)
    curve = fit_codec(made, squares(16), steps=120, batch_size=8, lr=4e-3, log_every=20)
    return made, curve


def test_fitting_reconstructs_and_normalises(fitted):
    codec, curve = fitted
    assert curve["loss"][-1] < 0.3 * curve["loss"][0]
    assert curve["psnr"][-1] > 22
    videos = squares(16).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    latent = codec.encode(videos)
    assert latent.mean(dim=(0, 1, 3, 4)).abs().max() < 0.05
    assert (latent.std(dim=(0, 1, 3, 4)) - 1).abs().max() < 0.05
    assert psnr(codec.decode(latent)[0], videos) == pytest.approx(curve["psnr"][-1], abs=1.0)


def test_small_latent_errors_stay_small(fitted):
    codec, _ = fitted
    videos = squares(16).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    latent = codec.encode(videos)
    noise = 0.05 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    assert psnr(codec.decode(latent + noise)[0], videos) > psnr(codec.decode(latent)[0], videos) - 2


def test_bfloat16_storage_costs_little(fitted, tmp_path):
    codec, curve = fitted
    save_codec(codec, tmp_path / "c.safetensors", torch.bfloat16)
    back = load_codec(CodecConfig(width=32, weights=tmp_path / "c.safetensors"), CHANNELS)
    videos = squares(16).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    assert psnr(back.decode(back.encode(videos))[0], videos) > curve["psnr"][-1] - 1


def test_fitting_is_repeatable():
    codecs = []
    for _ in range(2):
        torch.manual_seed(3)
        codecs.append(ShapesCodec(CodecConfig(width=16), 4))
        fit_codec(codecs[-1], squares(4), steps=3, batch_size=2, seed=7)
    for one, two in zip(codecs[0].parameters(), codecs[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_fitting_takes_batches_and_says_when_they_run_out():
    video = squares(2, 5).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    fit_codec(ShapesCodec(CodecConfig(width=16), 4), iter([video] * 20), steps=2)
    with pytest.raises(ValueError, match="ran out"):
        fit_codec(ShapesCodec(CodecConfig(width=16), 4), iter([video]), steps=2)
    with pytest.raises(ValueError, match=r"uint8 \[N, F, H, W, 3\]"):
        fit_codec(ShapesCodec(CodecConfig(width=16), 4), video, steps=2)
    with pytest.raises(ValueError, match="9 pixel frames are below the 17 of a clip"):
        fit_codec(ShapesCodec(CodecConfig(width=16), 4), squares(2, 9), steps=2)


def test_a_loss_that_is_not_finite_stops_the_fit():
    bad = torch.full((1, 3, 5, 32, 32), float("nan"))
    with pytest.raises(ValueError, match="loss is nan at step 0"):
        fit_codec(ShapesCodec(CodecConfig(width=16), 4), iter([bad] * 30), steps=2)
