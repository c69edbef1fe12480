"""A checkpoint imported by several ranks is one model, whatever the layout that reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_kvpo.checkpoint.adapters import (
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from megatron_kvpo.checkpoint.convert import load_base
from megatron_kvpo.checkpoint.formats import open_checkpoint
from megatron_kvpo.checkpoint.mapping import Sizes, base_table
from megatron_kvpo.checkpoint.state import load, shard_parameters
from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import base_parameters, whole_value
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import noise
from tests.ranks import on_ranks
from tests.unit import small
from tests.unit import tiny_checkpoints as tiny
from tools.convert_checkpoint import main

MODEL = (
    "model.sinusoid_dim=32", "model.hidden_dim=64", "model.ffn_dim=96", "model.num_heads=4",
    f"policy.lora_rank={tiny.SIZES.rank}", f"policy.lora_alpha={tiny.ALPHA}",
)  # fmt: skip


def _build(ranks: Any, *, adapted: bool) -> CausalWan:
    config = small.config(*MODEL, f"parallel.tensor={ranks.tensor.size}")
    policy = config.policy if adapted else None
    return CausalWan(config.model, Spec.build(config.model, config.parallel, ranks, policy))


def _whole(model: CausalWan) -> dict[str, Tensor]:
    axis = model.spec.ranks.tensor
    return {name: whole_value(p, axis) for name, p in base_parameters(model)}


@torch.no_grad()
def _velocity(model: CausalWan, slot: str | None) -> Tensor:
    model.spec.switch.slot = slot
    text = model.encode_text(noise((1, 8, 16), "text"))
    frames = noise((1, 3, *model.model_config.frame_shape), "latent")
    return model(frames, torch.full((1, 1), 800.0), range(3), text)


def _two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    base_file, lora_file = folder / "longlive_base.pt", folder / "lora.pt"
    arguments = ["import", base_file, folder / "tp2", "--adapter", lora_file, "--heads", 4,
                 "--alpha", tiny.ALPHA]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0

    ranks = start_ranks(ParallelConfig(tensor=2, timeout_s=120), "cpu")
    model = _build(ranks, adapted=True)
    for path in (base_file, folder / "tp2"):
        load_base(model, path)
        found[f"load_base {path.name}"] = _whole(model)
    for path in (lora_file, folder / "tp2"):
        for slot in ("current", "ema"):
            load_adapter(model, path, [slot])
            save_adapter(model, slot, folder / f"peft_{path.name}_{slot}", "original")
    plain = _velocity(model, None)
    found["adapted"] = _velocity(model, "current")
    kept = merge_adapter(model, "current")
    found["merged"] = _velocity(model, None)
    unmerge_adapter(model, kept)
    found["unmerged"] = torch.equal(plain, _velocity(model, None))
    stop_ranks()

    ranks = start_ranks(ParallelConfig(timeout_s=120), "cpu")  # two data ranks
    model = _build(ranks, adapted=False)
    own = dict(base_parameters(model))
    loaded = load(folder / "tp2/step_00000000", {"m": shard_parameters(own, ranks)}, ranks)
    found["resharded"] = dict(loaded["m"])
    stop_ranks()
    return found


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.gloo
def test_shares_of_two_ranks_are_one_model_and_go_out_as_they_came(tmp_path):
    base_file, lora_file = tiny.write_longlive(tmp_path)
    results = on_ranks(2, _two_ranks, tmp_path, folder=tmp_path)
    wanted = tiny.base()
    for result in results:
        assert _equal(result["load_base longlive_base.pt"], wanted)
        assert _equal(result["load_base tp2"], wanted)
        assert _equal(result["resharded"], wanted)
        assert result["unmerged"]
        assert torch.equal(result["adapted"], results[0]["adapted"])
        torch.testing.assert_close(result["merged"], result["adapted"], rtol=1e-4, atol=1e-4)

    for source in ("lora.pt", "tp2"):
        for slot in ("current", "ema"):
            saved = open_checkpoint(tmp_path / f"peft_{source}_{slot}")
            assert (saved.alpha, saved.foreign) == (tiny.ALPHA, ())
            assert _equal({n: saved.read(n) for n in saved.stored}, tiny.adapter())

    for part, source in (("original", base_file), ("peft", lora_file)):
        arguments = ["export", tmp_path / "tp2", tmp_path / part, "--to", part]
        assert main([str(a) for a in arguments]) == 0
        exported, given = open_checkpoint(tmp_path / part), open_checkpoint(source)
        assert _equal({n: exported.read(n) for n in exported.stored},
                      {n: given.read(n) for n in given.stored})  # fmt: skip

    ranks = start_ranks(ParallelConfig(timeout_s=120), "cpu")
    alone = _build(ranks, adapted=True)
    load_base(alone, base_file)
    load_adapter(alone, lora_file)
    torch.testing.assert_close(
        results[0]["adapted"], _velocity(alone, "reference"), rtol=1e-5, atol=1e-5
    )
    stop_ranks()


def _four_ranks(rank: int, folder: Path) -> dict[str, Any]:
    base_file, lora_file = folder / "longlive_base.pt", folder / "lora.pt"
    arguments = ["import", base_file, folder / "tp4", "--adapter", lora_file, "--heads", 4,
                 "--alpha", tiny.ALPHA]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    found: dict[str, Any] = {}
    for size in (4, 2, 1):
        ranks = start_ranks(ParallelConfig(tensor=size, timeout_s=120), "cpu")
        model = _build(ranks, adapted=True)
        load_base(model, folder / "tp4")
        load_adapter(model, folder / "tp4")
        found[f"base {size}"] = _whole(model)
        save_adapter(model, "current", folder / f"peft_{size}", "original")
        stop_ranks()
    return found


@pytest.mark.gloo
def test_what_four_ranks_imported_loads_at_four_two_and_one(tmp_path):
    tiny.write_longlive(tmp_path)
    for result in on_ranks(4, _four_ranks, tmp_path, folder=tmp_path):
        assert all(_equal(result[f"base {size}"], tiny.base()) for size in (4, 2, 1))
    for size in (4, 2, 1):
        saved = open_checkpoint(tmp_path / f"peft_{size}")
        assert _equal({n: saved.read(n) for n in saved.stored}, tiny.adapter())


PEAK = """
import sys, torch
from pathlib import Path
from tools.convert_checkpoint import main

def rss(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
assert main(["import", sys.argv[1], sys.argv[2] + "/warm", "--heads", "4"]) == 0
Path("/proc/self/clear_refs").write_text("5")
before = rss("VmRSS")
assert main(["import", sys.argv[3], sys.argv[2] + "/large", "--heads", "8"]) == 0
print(rss("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_import_keeps_its_share_and_little_more(kind, tmp_path):
    sizes = Sizes(hidden=512, ffn=4096, layers=8, text=1024)
    tensors = {n: torch.rand(r.shape) for n, r in base_table(sizes).items()}
    small_file = tiny.write_original(tmp_path / "small.safetensors")
    large = tmp_path / f"large.{kind}"
    save_file(tensors, large) if kind == "safetensors" else torch.save({"model": tensors}, large)
    share = sum(t.nbytes for t in tensors.values())
    largest = max(t.nbytes for t in tensors.values())
    assert share > 1.8e8
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", PEAK, small_file, tmp_path, large],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    peak = int(result.stdout.split()[-1])
    assert peak < share + 1.3 * largest, (peak, share, largest)
