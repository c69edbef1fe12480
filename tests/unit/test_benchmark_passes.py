"""tools.benchmark_passes on the shapes recipe: what is recorded, and that the passes are real."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_kvpo.config import load_config
from megatron_kvpo.model.flops import forward_flops, pass_flops
from megatron_kvpo.training.policy import Policy
from tests import quiet
from tests.unit import small
from tools import benchmark_kernels, benchmark_passes

_quiet_afterwards = quiet.quiet_afterwards

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "shapes" / "demo.yaml"
BLOCK, WINDOW, SINK, RANK = 3, 12, 3, 32
FAST = ("--repeats", "3", "--warmup", "1")
ONE_PASS = {
    "kind", "slot", "rows", "repeats", "min_ms", "median_ms", "max_ms", "ms_per_row", "host_ms",
    "tflop", "tflops", "share",
}  # fmt: skip

FLOOR = {
    "attention_ms": 1.5, "text_ms": 0.25, "linear_ms": 2.0, "adapters_ms": 0.5, "floor_ms": 3.75,
    "floor_ms_per_row": 3.75, "share": 0.755,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipe's paths count from there


def run(out: Path, *more: str) -> dict:
    assert benchmark_passes.main([str(RECIPE), "device=cpu", "--output", str(out), *more]) == 0
    return json.loads(out.read_text())


def test_every_pass_is_recorded_with_what_it_computes(tmp_path):
    out = tmp_path / "made" / "passes.json"
    found = run(out, "--rows", "1,3", "--backward", "2", *FAST, "--profile")
    kinds = [(p["kind"], p["slot"], p["rows"]) for p in found["passes"]]
    assert kinds == [("forward", "old", 1), ("forward", "old", 3),
                     ("forward_backward", "current", 2)]  # fmt: skip
    model = load_config(RECIPE).model
    tokens = BLOCK * model.tokens_per_frame, WINDOW * model.tokens_per_frame
    for one in found["passes"]:
        assert one.keys() == ONE_PASS  # no memory and no floor without a GPU
        graph = one["kind"] == "forward_backward"
        flops = one["rows"] * pass_flops(model, *tokens, RANK, graph=graph)
        assert one["tflop"] == pytest.approx(flops / 1e12, rel=1e-12)
        assert one["repeats"] == 3
        assert 0 < one["min_ms"] <= one["median_ms"] <= one["max_ms"]
        assert one["host_ms"] > 0
        assert one["ms_per_row"] == pytest.approx(one["median_ms"] / one["rows"])
        assert one["tflops"] == pytest.approx(1000 * one["tflop"] / one["median_ms"])
        assert one["share"] == pytest.approx(one["tflops"] / found["matmul_ceiling_tflops"])
    assert found.keys() >= {"date", "commit", "command", "versions", "machine"}
    assert found["name"] == "passes"
    assert found["config"]["stream"]["window_frames"] == WINDOW
    table = out.with_suffix(".md").read_text()
    assert f"| forward | old | 3 | {found['passes'][1]['median_ms']:.4g} (" in table
    assert "| floor ms |" not in table
    assert "Self CPU time total" in out.with_suffix(".txt").read_text()

    found["passes"][0] |= {"peak_memory_gib": 7.25, "floor": FLOOR}  # as on a GPU
    table = benchmark_passes.table(found)
    assert "| 7.2 |\n" in table
    assert "\n| 1 | 1.5 | 0.25 | 2 | 3.75 | 3.75 | 76% | 0.5 |\n" in table


def test_the_bare_base_computes_no_adapters_and_nothing_else_is_written(tmp_path):
    found = run(tmp_path / "bare.json", "policy.lora_rank=8", "model.weights=null",
                "--slot", "none", *FAST)  # fmt: skip
    model = load_config(RECIPE).model
    tokens = BLOCK * model.tokens_per_frame, WINDOW * model.tokens_per_frame
    (one,) = found["passes"]
    assert (one["slot"], one["rows"]) == ("none", 1)
    assert one["tflop"] == pytest.approx(pass_flops(model, *tokens) / 1e12, rel=1e-12)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md"]


def test_a_video_is_decoded_after_its_blocks_or_beside_them(tmp_path):
    from tests.unit.test_wan_vae import tiny

    latents = load_config(RECIPE).model.latent_channels
    tiny(z_dim=latents, latents_mean=[0.0] * latents, latents_std=[1.0] * latents).save_pretrained(
        tmp_path / "vae"
    )
    video = ["--rows", "", "--video", f"codec.vae={tmp_path / 'vae'}", *FAST]
    (after,) = run(tmp_path / "after.json", *video)["passes"]
    assert after["with_decode_ms"] == pytest.approx(after["median_ms"] + after["decode_ms"])
    (beside,) = run(tmp_path / "beside.json", *video, "--decode-on", "cpu")["passes"]
    assert beside["decode_on"] == "cpu"
    assert beside["with_decode_ms"] > max(beside["min_ms"], beside["decode_ms"]) / 2
    assert "ms, on cpu beside the next, together" in (tmp_path / "beside.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "--decode-on", "cuda:1"], r"give that and codec.vae"),
        (["--video", "codec.vae=nowhere"], r"nowhere holds no Wan VAE"),
        (["--rows", "1,0"], r"--rows \[1, 0\]: a pass has at least 1 row"),
        (["--backward", "-1"], r"--backward \[-1\]: a pass has at least 1 row"),
        (["--rows", ""], r"--rows is empty"),
        (["--rows", "", "--backward", "1", "--profile"], r"--rows is empty"),
        (["--slot", "newest"], r"--slot newest is no slot: .*'current', 'old', .*'none'"),
        (["--repeats", "0"], r"--repeats 0 and --warmup 3 must be at least 1"),
        (["--warmup", "0"], r"--repeats 10 and --warmup 0 must be at least 1"),
        (["policy.mode=full"], r"policy.mode is full"),
        (["parallel.tensor=3"], r"model.num_heads 4 does not divide"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, arguments, message):
    out = ["--output", str(tmp_path / "o.json")]
    with pytest.raises(ValueError, match=message):
        benchmark_passes.main([str(RECIPE), "device=cpu", *out, *arguments])
    assert list(tmp_path.iterdir()) == []


def test_only_json_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"passes.csv must end in .json"):
        benchmark_passes.main([str(RECIPE), "--output", str(tmp_path / "passes.csv")])


def test_a_call_is_timed_by_itself_in_milliseconds():
    def call() -> None:
        time.sleep(0.01)

    device = torch.device("cpu")
    times = benchmark_kernels.call_times(call, device, 3, before=lambda: time.sleep(0.2))
    host = benchmark_kernels.host_time(call, device, before=lambda: time.sleep(0.2))
    assert len(times) == 3
    assert all(10 <= taken < 200 for taken in (*times, host))


ranks = small.ranks


@pytest.fixture(scope="module")
def policy(ranks):
    built = Policy.build(small.config(), ranks)
    small.enliven(built.model)
    benchmark_passes.stir(built)
    return built


def test_adapters_act_and_rows_see_pages_of_their_own(policy):
    def velocity(slot: str | None) -> torch.Tensor:
        with policy.bank.use(slot), torch.no_grad():
            return benchmark_passes.Scene(policy, small.config(), rows=2).forward()

    old, bare = velocity("old"), velocity(None)
    assert old.shape == (2, BLOCK, 4, 4, 4)
    assert torch.equal(old, velocity("old"))  # the same numbers each time
    assert (old - bare).abs().max() > 1e-3 * bare.abs().max()
    read = benchmark_passes.pages_read(2, SINK, WINDOW - BLOCK)
    assert read == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 9, 10, 11, 12, 13, 14]]


def test_backward_reaches_all_trained_adapters_and_is_forgotten(policy):
    def gradients() -> list[torch.Tensor]:
        return [p.main_grad for p in policy.optimizer.parameters]

    with policy.acting("current"):
        scene = benchmark_passes.Scene(policy, small.config(), rows=2)
        scene.forget()
        scene.forward_backward()
        names = policy.trained()
        silent = [n for n, p in names.items() if not p.main_grad.any()]
        # The text is encoded once for many passes: its own layers wait for the last of them.
        assert silent == [n for n in names if ".cross_attn.k." in n or ".cross_attn.v." in n]
        once = [gradient.clone() for gradient in gradients()]
        scene.forget()
        assert not any(gradient.any() for gradient in gradients())
        scene.forward_backward()
        assert all(torch.equal(a, b) for a, b in zip(once, gradients(), strict=True))


def test_the_floor_holds_the_products_and_the_attention_of_a_pass(ranks):
    config, calls = small.config(), dict[str, int]()
    tokens = config.model.tokens_per_frame
    for name, count, call in benchmark_kernels.floor_calls(config, ranks, 2, adapters=True):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        calls[name] = calls.get(name, 0) + count * counter.get_total_flops()
    expected = forward_flops(config.model, BLOCK * tokens, WINDOW * tokens, 4)
    names = {"attention": "attention_ms", "text": "text_ms", "linear": "linear_ms",
             "lora": "adapters_ms"}  # fmt: skip
    for part, name in names.items():
        assert config.model.num_layers * calls[name] == 2 * expected[part], part

    found = benchmark_kernels.floor(config, ranks, 2, adapters=True, warmup=1, repeats=2)
    named = [found[name] for name in ("attention_ms", "text_ms", "linear_ms")]
    assert found["floor_ms"] == pytest.approx(sum(named))
    assert found["floor_ms_per_row"] == pytest.approx(found["floor_ms"] / 2)
    assert min(*named, found["adapters_ms"]) > 0
    bare = benchmark_kernels.floor(config, ranks, 2, adapters=False, warmup=1, repeats=2)
    assert found.keys() - bare.keys() == {"adapters_ms"}
