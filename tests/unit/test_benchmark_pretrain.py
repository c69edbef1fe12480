"""tools.benchmark_pretrain on a tiny recipe, and the operations that it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_kvpo import settings
from megatron_kvpo.config import StreamConfig
from megatron_kvpo.method_config import ModelConfig
from megatron_kvpo.model import sdpa
from megatron_kvpo.model.flops import forward_flops, training_flops
from megatron_kvpo.model.sight import attend_seen, diffusion_sight, teacher_sight
from megatron_kvpo.training.pretrain import PretrainConfig
from tests import quiet
from tests.unit.tiny_pretrain import LORA, RECIPE
from tools import benchmark_pretrain

_quiet_afterwards = quiet.quiet_afterwards

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("sight_of", [teacher_sight, diffusion_sight])
def test_attention_is_counted_over_the_keys_that_are_seen(sight_of, monkeypatch):
    """Forward, and in backward twice that and the forward again, as torch counts its products."""
    monkeypatch.setattr(sdpa, "KERNELS", [SDPBackend.MATH])
    monkeypatch.setattr(sdpa, "_TABLE", {})
    model = ModelConfig(hidden_dim=32, ffn_dim=48, num_layers=1, num_heads=2, text_length=4)
    sight = sight_of(StreamConfig(num_frames=21, resident_frames=21), 4)
    inputs = [torch.randn(sight.num_tokens, 1, 2, 16, requires_grad=True) for _ in range(3)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = attend_seen(*inputs, sight)
        forward = counter.get_total_flops()
        out.sum().backward()
    keys = sight.num_pairs / sight.num_tokens
    assert forward == forward_flops(model, sight.num_tokens, keys)["attention"]
    assert counter.get_total_flops() == 4 * forward


def test_a_training_step_is_three_forwards_or_less_a_frozen_bases_gradient():
    model = ModelConfig(preset="wan2.1_1.3b")
    sight = teacher_sight(StreamConfig(num_frames=21, resident_frames=21), model.tokens_per_frame)
    tokens, pairs = sight.num_tokens, sight.num_pairs
    parts = forward_flops(model, tokens, pairs / tokens)
    assert training_flops(model, tokens, pairs) == 3 * sum(parts.values())
    assert parts["attention"] == 30 * 4 * 1536 * pairs
    assert training_flops(model, tokens, pairs) / 1e12 == pytest.approx(957, abs=5)
    adapted = forward_flops(model, tokens, pairs / tokens, 256)
    expected = 3 * sum(adapted.values()) - parts["linear"]
    assert training_flops(model, tokens, pairs, 256) == expected


def test_a_step_is_recorded_with_what_it_computes(tmp_path):
    path, out = tmp_path / "tiny.yaml", tmp_path / "made" / "step.json"
    path.write_text(yaml.safe_dump(RECIPE))
    arguments = [str(path), "fitting.micro_rows=2", "--output", str(out), "--steps", "3"]
    assert benchmark_pretrain.main([*arguments, "--warmup", "1", "--peak", "2"]) == 0
    found = json.loads(out.read_text())
    config = settings.load(PretrainConfig, path)
    sight = teacher_sight(config.stream, 16)
    one = training_flops(config.model, sight.num_tokens, sight.num_pairs)
    extra = sum(forward_flops(config.model, sight.num_tokens,
                              sight.num_pairs / sight.num_tokens).values())  # fmt: skip
    assert found["own_estimates"]
    assert found["tflop"] == pytest.approx(4 * (one + extra) / 1e12)
    assert (found["clips"], found["tokens"], found["steps"]) == (4, 4 * 33 * 16, 3)
    assert 0 < found["min_s"] <= found["median_s"] <= found["max_s"]
    assert found["tflops"] == pytest.approx(found["tflop"] / found["median_s"])
    assert found["mfu"] == pytest.approx(found["tflops"] / 2)
    assert found["share"] == pytest.approx(found["tflops"] / found["matmul_ceiling_tflops"])
    assert sum(found["stages_s"].values()) == pytest.approx(found["median_s"], rel=0.5)
    table = out.with_suffix(".md").read_text()
    assert f"| full | teacher | 18 | 4 | {found['median_s']:.4g} (" in table
    assert f"| {found['mfu']:.1%} |" in table
    other = ["fitting.forcing=diffusion", "fitting.own_estimates_from=1", *LORA]
    assert benchmark_pretrain.main([*arguments, "--warmup", "0", "--no-own", *other]) == 0
    found = json.loads(out.read_text())
    assert "mfu" not in found
    assert found["tokens"] == 4 * 18 * 16


def test_a_trace_that_does_not_end_leaves_the_record(tmp_path, monkeypatch):
    path, out = tmp_path / "tiny.yaml", tmp_path / "step.json"
    path.write_text(yaml.safe_dump(RECIPE))

    def stopped(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_pretrain, "traced", stopped)
    with pytest.raises(KeyboardInterrupt):
        benchmark_pretrain.main([str(path), "--output", str(out), "--steps", "1", "--warmup", "0",
                                 "--profile"])  # fmt: skip
    assert json.loads(out.read_text())["median_s"] > 0


def test_peaks_are_known_by_name():
    assert benchmark_pretrain.peak_of("NVIDIA H100 80GB HBM3") == 989
    assert benchmark_pretrain.peak_of("NVIDIA H200") == 989
    assert benchmark_pretrain.peak_of("x86_64") is None


def test_options_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.json"):
        benchmark_pretrain.main(["x.yaml", "--output", "x.txt"])
    with pytest.raises(ValueError, match="--steps 0 must be above 0"):
        benchmark_pretrain.main(["x.yaml", "--output", "x.json", "--steps", "0"])
