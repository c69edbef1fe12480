"""The transformer: cached passes equal one block-causal pass, and nothing else leaks in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_kvpo.flow import timestep
from megatron_kvpo.model.embeddings import patchify, sinusoid, unpatchify
from megatron_kvpo.model.rope import Rotary, rotate
from megatron_kvpo.model.sight import teacher_frames, teacher_sight
from megatron_kvpo.rollout.stream import Stream
from tests.unit import small

ranks = small.ranks


@pytest.fixture(scope="module")
def tiny(ranks):
    return small.build(ranks)


def apart(a, b) -> float:
    """Largest difference over the largest size."""
    return float((a - b).abs().max() / b.abs().max())


def test_streaming_with_pages_equals_one_block_causal_pass(tiny):
    """Clean frames at timestep 0, noisy ones at each block's own level, each with its sight."""
    stream_config = tiny.config.stream
    total, size = stream_config.num_frames, stream_config.block_frames
    clean, noisy = tiny.latents(total, 2), tiny.latents(total, 2, "noisy")
    text = tiny.text(*small.TEXTS[:2])
    sigmas = torch.linspace(0.4, 1.0, total // size)
    time = timestep(sigmas).repeat_interleave(size)
    history = total - size  # no block sees the last one
    time = torch.cat([torch.zeros(history), time]).expand(2, -1)
    sight = teacher_sight(stream_config, tiny.config.model.tokens_per_frame)
    both, frames = torch.cat([clean[:, :history], noisy], 1), teacher_frames(stream_config)
    with torch.no_grad():
        whole = tiny.model(both, time, frames, text, None, sight)
        stream = Stream.begin(tiny.world, 2, text)
        for block, sigma in enumerate(sigmas.tolist()):
            span = slice(block * size, (block + 1) * size)
            velocity = stream.velocity(noisy[:, span], sigma)
            assert apart(velocity, whole[:, history:][:, span]) < 1e-5, f"block {block}"
            stream.commit(clean[:, span])
    stream.release()


def test_one_timestep_for_a_row_is_that_timestep_for_each_frame(tiny):
    noisy, text = tiny.latents(3, 2), tiny.text(*small.TEXTS[:2])
    time = torch.tensor([[700.0], [200.0]])
    with torch.no_grad():
        one = tiny.model(noisy, time, range(3), text)
        each = tiny.model(noisy, time.expand(-1, 3), range(3), text)
        other = tiny.model(noisy, time.flip(0), range(3), text)
    assert apart(one, each) < 1e-6
    assert apart(one, other) > 1e-2, "the timestep does not matter"


def test_a_wrong_number_of_timesteps_is_refused(tiny):
    with pytest.raises(ValueError, match="2 timesteps for 3 latent frames"):
        tiny.model(tiny.latents(3), torch.zeros(1, 2), range(3), tiny.text())


def test_a_row_does_not_see_the_other_rows(tiny):
    noisy, text = tiny.latents(3, 3), tiny.text(*small.TEXTS)
    time = torch.tensor([[900.0], [500.0], [100.0]])
    with torch.no_grad():
        together = tiny.model(noisy, time, range(3), text)
        for row in range(3):
            keys = text.select(torch.tensor([row]))
            alone = tiny.model(noisy[row : row + 1], time[row : row + 1], range(3), keys)
            assert apart(alone[0], together[row]) < 1e-6


def test_text_matters_and_so_does_its_padding(tiny):
    noisy, time = tiny.latents(3), torch.full((1, 1), 800.0)
    embedded = tiny.encode(small.TEXTS[:1])
    with torch.no_grad():
        full = tiny.model(noisy, time, range(3), tiny.model.encode_text(embedded))
        cut = tiny.model(noisy, time, range(3), tiny.model.encode_text(embedded[:, :-1]))
        other = tiny.model(noisy, time, range(3), tiny.text(small.TEXTS[1]))
    assert not embedded[:, -1].any()
    assert apart(cut, full) > 1e-3, "padding is not attended"
    assert apart(other, full) > 1e-2


def test_only_distances_in_time_matter_not_where_time_begins(tiny):
    """Rotary keys and queries: q_m . k_n depends on m - n."""
    noisy, time, text = tiny.latents(3), torch.full((1, 1), 600.0), tiny.text()
    with torch.no_grad():
        here = tiny.model(noisy, time, [0, 1, 2], text)
        later = tiny.model(noisy, time, [40, 41, 42], text)
        spread = tiny.model(noisy, time, [0, 1, 20], text)
    assert apart(later, here) < 1e-5
    assert apart(spread, here) > 1e-3, "positions do not matter"


def test_frames_past_the_rotary_table_are_refused(tiny):
    with pytest.raises(ValueError, match=r"62\.\.64 leave the rotary table of 64.*max_frames"):
        tiny.model(tiny.latents(3), torch.zeros(1, 1), [62, 63, 64], tiny.text())


def test_rotations_are_those_of_the_formula():
    """Complex pairs: time, then row, then column; each axis with its own frequencies."""
    head, grid, frames = 32, (3, 2), [5, 9]
    x = torch.randn(12, 1, 2, head)
    turned = rotate(x, Rotary(head, grid, 16).table(frames, x.device))
    side = head // 2 - 2 * (head // 6), head // 6, head // 6
    for token in range(12):
        place = frames[token // 6], token % 6 // 2, token % 2
        phases = [p * 10000 ** (-i / n) for p, n in zip(place, side, strict=True) for i in range(n)]
        unit = torch.tensor([complex(math.cos(a), math.sin(a)) for a in phases])
        pairs = torch.view_as_complex(x[token].reshape(1, 2, head // 2, 2))
        expected = torch.view_as_real(pairs * unit).flatten(-2)
        torch.testing.assert_close(turned[token], expected)


def test_the_time_embedding_holds_cosines_then_sines():
    t = torch.tensor([[0.0, 937.5]])
    made = sinusoid(t, 8)
    for row, value in enumerate((0.0, 937.5)):
        angles = [value * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(made[0, row], torch.tensor(expected))


def test_patches_are_the_convolution_and_the_head_inverts_their_order():
    latent = torch.randn(2, 3, 4, 4, 6)
    conv = nn.Conv3d(4, 8, (1, 2, 2), (1, 2, 2))
    weight = conv.weight.flatten(1)
    tokens = nn.functional.linear(patchify(latent, (1, 2, 2)), weight, conv.bias)
    theirs = conv(latent.transpose(1, 2)).flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(tokens, theirs)
    channels_last = patchify(latent, (1, 2, 2)).unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2)
    assert torch.equal(unpatchify(channels_last, (1, 2, 2), (4, 4, 6)), latent)


def test_a_text_may_serve_many_rows(tiny):
    keys = tiny.text(*small.TEXTS).select(torch.tensor([2, 0, 2]))
    for (key, value), (own_key, own_value) in zip(
        keys.layers, tiny.text(*small.TEXTS).layers, strict=True
    ):
        assert torch.equal(key, own_key[[2, 0, 2]])
        assert torch.equal(value, own_value[[2, 0, 2]])


def velocity_gradients(tiny, sampled) -> dict[str, torch.Tensor]:
    stream = sampled.prefix.fork(1, tiny.model.encode_text(tiny.encode(small.TEXTS[:1])))
    stream.velocity(tiny.latents(3, 1, "noisy"), 0.9).square().sum().backward()
    stream.release()
    trained = tiny.policy.trained()
    found = {name: p.main_grad.clone() for name, p in trained.items()}
    tiny.policy.optimizer.zero_grad()
    return found


def test_recompute_gives_the_same_gradients(ranks):
    """Blocks are run again in backward: same numbers, and really run again."""
    found, calls = {}, {}
    for recompute in ("false", "true"):
        tiny = small.build(ranks, f"model.recompute={recompute}")
        tiny.stir("current", "old")
        sampled, counted = tiny.roll_out(), []
        tiny.model.blocks[0].ffn.register_forward_hook(
            lambda *_, counted=counted: counted.append(1)
        )
        with tiny.policy.acting("current"):
            found[recompute] = velocity_gradients(tiny, sampled)
        calls[recompute] = len(counted)
        sampled.release()
    assert calls == {"false": 1, "true": 2}
    for name, gradient in found["true"].items():
        assert gradient.any(), name
        assert apart(gradient, found["false"][name]) < 1e-5, name
