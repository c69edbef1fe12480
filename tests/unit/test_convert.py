"""Every form of checkpoint comes in and goes out bit for bit, or is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_kvpo.checkpoint import state
from megatron_kvpo.checkpoint.convert import checked, describe, load_base
from megatron_kvpo.checkpoint.formats import open_checkpoint
from megatron_kvpo.checkpoint.mapping import (
    CUT_DIM,
    PRESETS,
    Sizes,
    adapter_table,
    base_table,
    diffusers_name,
    released_name,
)
from megatron_kvpo.config import ParallelConfig
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import partition_of
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import base_parameters
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from tests.unit import small
from tests.unit import tiny_checkpoints as tiny
from tools.convert_checkpoint import TOLERANCE, main


@pytest.fixture
def alone():
    yield start_ranks(ParallelConfig(timeout_s=120), "cpu")
    stop_ranks()


def call(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0, arguments


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 1, arguments
    return capsys.readouterr().err


def equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def contents(path: Path, **how: str) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path, **how)
    assert not checkpoint.foreign
    return {name: checkpoint.read(name) for name in checkpoint.stored}


def test_the_table_counts_what_is_released():
    table = base_table(PRESETS["wan2.1_1.3b"])
    assert len(table) == 825
    assert sum(torch.Size(row.shape).numel() for row in table.values()) == 1_418_996_800
    assert len(base_table(PRESETS["wan2.1_14b"])) == 27 * 40 + 15
    rows = adapter_table(Sizes(hidden=1536, ffn=8960, layers=30, rank=256))
    assert len(rows) == 600
    assert sum(torch.Size(row.shape).numel() for row in rows.values()) == 349_962_240


def test_the_table_is_that_of_the_model(alone):
    config = small.config()
    model = CausalWan(config.model, Spec.build(config.model, config.parallel, alone, config.policy))
    sizes = Sizes(hidden=32, ffn=48, layers=2, channels=4, text=16, sinusoid=256, rank=4)
    rows = base_table(sizes) | adapter_table(sizes)
    own = {
        name.replace(".adapter.", ".").removesuffix(".current"): parameter
        for name, parameter in model.named_parameters()
        if ".adapter." not in name or name.endswith(".current")
    }
    assert rows.keys() == own.keys()
    for name, row in rows.items():
        assert row.shape == tuple(own[name].shape), name
        assert CUT_DIM[row.split] == partition_of(own[name]), name


def test_diffusers_names_are_those_of_its_class():
    net = tiny.diffusers_model()  # a strict load of every mapped name
    assert {diffusers_name(name) for name in base_table(tiny.SIZES)} == set(net.state_dict())
    for name in base_table(tiny.SIZES):
        assert released_name(diffusers_name(name)) == released_name(name) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("blocks.7.self_attn.q.lora_A.weight", "blocks.7.self_attn.q.lora_A"),
        ("blocks.7.attn2.to_out.0.lora_B.default.weight", "blocks.7.cross_attn.o.lora_B"),
        ("blocks.7.ffn.net.0.proj.lora_up.weight", "blocks.7.ffn.0.lora_B"),
        ("blocks.7.norm2.weight", "blocks.7.norm3.weight"),
        ("scale_shift_table", "head.modulation"),
        ("text_embedding.0.lora_A.weight", None),
        ("blocks.7.self_attn.q.lora_magnitude_vector.weight", None),
        ("img_emb.proj.0.weight", None),
    ],
)
def test_names_are_known_by_any_of_their_forms(key, name):
    assert released_name(key) == name


def written(form: str, folder: Path) -> list[object]:
    """A tiny base in one form; the arguments of the tool that name it."""
    if form == "diffusers":
        tiny.diffusers_model().save_pretrained(folder / "net")
        return [folder / "net"]
    if form == "diffusers pipeline, sharded":
        tiny.diffusers_model().save_pretrained(folder / "pipe/transformer", max_shard_size="200KB")
        (folder / "pipe/model_index.json").write_text("{}")
        assert (
            folder / "pipe/transformer/diffusion_pytorch_model.safetensors.index.json"
        ).is_file()
        return [folder / "pipe"]
    if form == "self-forcing":
        ema = {f"model._fsdp_wrapped_module.{n.replace('blocks.1.', 'blocks.1._orig_mod.')}": v
               for n, v in tiny.base().items()}  # fmt: skip
        other = {name: torch.zeros_like(value) for name, value in ema.items()}
        torch.save({"generator": other, "generator_ema": ema}, folder / "self_forcing.pt")
        return [folder / "self_forcing.pt"]
    if form == "flat pt":
        torch.save(tiny.base(), folder / "wan.pth")
        return [folder / "wan.pth"]
    prefix = {"comfyui": "model.diffusion_model.", "original": "", "wrapped": "generator.model."}
    return [tiny.write_original(folder / "wan.safetensors", prefix=prefix[form])]


@pytest.mark.parametrize(
    "form",
    ["original", "wrapped", "comfyui", "diffusers", "diffusers pipeline, sharded", "self-forcing",
     "flat pt"],
)  # fmt: skip
def test_every_form_comes_in_bit_for_bit(form, tmp_path):
    call("import", *written(form, tmp_path), tmp_path / "ours", "--heads", 4)
    assert equal(contents(tmp_path / "ours"), tiny.base())
    assert open_checkpoint(tmp_path / "ours").heads == 4


@pytest.mark.parametrize("to", ["original", "diffusers", "comfyui", "original folder", "sharded"])
def test_every_form_goes_out_bit_for_bit(to, tmp_path, capsys):
    source = tiny.write_original(tmp_path / "wan.safetensors")
    call("import", source, tmp_path / "ours", "--heads", 4)
    out = tmp_path / ("out" if to in ("diffusers", "original folder", "sharded") else
                      "out.safetensors")  # fmt: skip
    more = ["--shard-gb", "0.0001"] if to == "sharded" else []
    call("export", tmp_path / "ours", out, "--to", to if to in ("diffusers", "comfyui") else
         "original", *more)  # fmt: skip
    assert equal(contents(out), tiny.base())
    said = capsys.readouterr().err
    assert ("outputs agree to" in said) == (to == "diffusers")
    if to == "comfyui":
        assert all(name.startswith("model.diffusion_model.") for name in load_file(out))
    if to == "sharded":
        index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 3
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny.base().values())
    call("verify", source, out)


def test_diffusers_loads_what_is_exported(tmp_path):
    from diffusers import WanTransformer3DModel

    tiny.write_original(tmp_path / "wan.safetensors")
    call("export", tmp_path / "wan.safetensors", tmp_path / "net", "--to", "diffusers",
         "--heads", 4)  # fmt: skip
    net, report = WanTransformer3DModel.from_pretrained(tmp_path / "net", output_loading_info=True)
    assert not any(report.values()), report
    assert (net.config.num_attention_heads, net.config.attention_head_dim) == (4, 16)
    assert torch.equal(tiny.run(net), tiny.run(tiny.diffusers_model()))


def test_a_type_can_be_chosen(tmp_path):
    tiny.write_original(tmp_path / "wan.safetensors")
    call("import", tmp_path / "wan.safetensors", tmp_path / "ours", "--heads", 4, "--dtype",
         "bfloat16")  # fmt: skip
    call("export", tmp_path / "ours", tmp_path / "net", "--to", "diffusers")
    narrow = {name: value.bfloat16() for name, value in tiny.base().items()}
    assert equal(contents(tmp_path / "net"), narrow)


def test_merged_weights_are_base_plus_scaled_product(tmp_path):
    base_file, lora_file = tiny.write_longlive(tmp_path)
    for keys in ("original", "diffusers"):
        call("export", base_file, tmp_path / keys, "--to", "merged", "--keys", keys, "--heads", 4,
             "--adapter", lora_file, "--alpha", tiny.ALPHA)  # fmt: skip
    merged, lora = contents(tmp_path / "original"), tiny.adapter()
    assert equal(merged, contents(tmp_path / "diffusers"))
    for name, value in tiny.base().items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in lora:
            up, down = (lora[f"{module}.lora_{half}"].double() for half in "BA")
            wanted = value.double() + tiny.ALPHA / tiny.SIZES.rank * up @ down
            torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-6, atol=1e-6)
            assert not torch.equal(merged[name], value)
        else:
            assert torch.equal(merged[name], value), name


def test_an_adapter_goes_out_with_its_output_compared(tmp_path, capsys):
    base_file, lora_file = tiny.write_longlive(tmp_path)
    how = ["--to", "peft", "--heads", 4, "--alpha", tiny.ALPHA, "--adapter", lora_file]
    call("export", base_file, tmp_path / "adapter", *how)
    assert "40 tensors, read back bit for bit; outputs agree to" in capsys.readouterr().err
    assert equal(contents(tmp_path / "adapter"), tiny.adapter())
    assert open_checkpoint(tmp_path / "adapter").alpha == tiny.ALPHA
    said = refused(capsys, "export", tmp_path / "adapter", tmp_path / "b", "--to", "peft",
                   "--alpha", 5)  # fmt: skip
    assert "has alpha 6, 5 was asked for" in said


def test_an_output_that_differs_is_not_published(tmp_path, capsys, monkeypatch):
    source = tiny.write_original(tmp_path / "wan.safetensors")
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)
    said = refused(capsys, "export", source, tmp_path / "net", "--to", "diffusers", "--heads", 4)
    assert "its output differs from ours by" in said
    assert not (tmp_path / "net").exists()


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    base_file, lora_file = tiny.write_longlive(tmp_path)
    found = []
    for path in (base_file, lora_file):
        call("inspect", path)
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] | {"path": ""} == {
        "path": "", "form": "original", "part": "generator", "tensors": 69,
        "parameters": sum(t.numel() for t in tiny.base().values()), "dtypes": ["float32"],
        "foreign": [], "hidden": 64, "ffn": 96, "layers": 2, "heads": None, "heads_told": False,
        "text_dim": 16, "latent_channels": 4, "complete": True,
    }  # fmt: skip
    assert (found[1]["form"], found[1]["tensors"], found[1]["adapter_rank"]) == ("peft", 40, 4)
    assert found[1]["adapter_alpha"] is None


def test_verify_names_what_differs(tmp_path, capsys):
    one = tiny.write_original(tmp_path / "one.safetensors")
    tensors = tiny.base()
    tensors["head.head.bias"] = tensors["head.head.bias"] + 1e-7
    two = tiny.write_original(tmp_path / "two.safetensors", tensors)
    assert "head.head.bias: differs by" in refused(capsys, "verify", one, two)
    call("verify", one, two, "--tolerance", "1e-5")
    del tensors["head.head.bias"]
    tiny.write_original(two, tensors)
    assert f"head.head.bias is in {one} only" in refused(capsys, "verify", one, two)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_each_policy_of_a_run_goes_out(mode, alone, tmp_path):
    run = small.build(alone, f"policy.mode={mode}")
    generator = torch.Generator().manual_seed(3)
    for slot in ("current", "ema"):
        bank = run.policy.bank
        with torch.no_grad(), bank.use(slot):
            for p in run.policy.trained().values():
                p.add_(torch.randn(p.shape, generator=generator))
        if slot == "current":
            bank.copy("current", "ema")
    state.save(tmp_path / "checkpoints", 4, run.policy.sharded_state(), alone, keep=1)
    (tmp_path / "config.yaml").write_text("{model: {num_heads: 2}, policy: {lora_alpha: 8.0}}")
    found = {slot: contents(tmp_path / "checkpoints", slot=slot) for slot in ("current", "ema")}
    for slot, tensors in found.items():
        if mode == "lora":
            held = run.policy.bank.adapters["blocks.1.ffn.2.adapter"]
            assert torch.equal(tensors["blocks.1.ffn.2.lora_B"], held.lora_B[slot])
        else:
            with run.policy.bank.use(slot):
                own = {name: p.detach().clone() for name, p in base_parameters(run.model)}
            assert equal(tensors, own)
        checked(open_checkpoint(tmp_path / "checkpoints", slot=slot))
    assert not equal(found["current"], found["ema"])
    opened = open_checkpoint(tmp_path / "checkpoints")
    assert (opened.heads, opened.alpha) == (2, 8.0)


def test_a_model_is_filled_from_any_form(alone, tmp_path):
    config = small.config("model.sinusoid_dim=32", "model.hidden_dim=64", "model.ffn_dim=96",
                          "model.num_heads=4")  # fmt: skip
    tiny.diffusers_model().save_pretrained(tmp_path / "net")
    for path in (tiny.write_longlive(tmp_path)[0], tmp_path / "net"):
        bare = CausalWan(config.model, Spec.build(config.model, config.parallel, alone, None))
        load_base(bare, path)
        assert equal({n: p.detach() for n, p in base_parameters(bare)}, tiny.base())
    other = small.config("model.sinusoid_dim=32", "model.hidden_dim=64", "model.ffn_dim=96")
    wrong = CausalWan(other.model, Spec.build(other.model, other.parallel, alone, None))
    with pytest.raises(ValueError, match=r"net has 4 heads, model.num_heads is 2"):
        load_base(wrong, tmp_path / "net")


def test_what_does_not_fit_is_named(tmp_path, capsys):
    tensors = tiny.base()
    tensors["blocks.0.ffn.1.weight"] = tensors.pop("blocks.1.ffn.2.bias")
    tensors["blocks.0.ffn.0.weight"] = torch.zeros(96, 63)
    path = tiny.write_original(tmp_path / "w.safetensors", tensors)
    said = refused(capsys, "import", path, tmp_path / "ours", "--heads", 4)
    for part in ("w.safetensors", "1 are missing", "blocks.1.ffn.2.bias", "blocks.0.ffn.1.weight"):
        assert part in said
    tensors["blocks.1.ffn.2.bias"] = tensors.pop("blocks.0.ffn.1.weight")
    tiny.write_original(path, tensors)
    said = refused(capsys, "import", path, tmp_path / "ours", "--heads", 4)
    assert "blocks.0.ffn.0.weight is [96, 63], the model needs [96, 64]" in said
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_that_lacks_its_last_layers_is_refused(tmp_path):
    tensors = {n: t for n, t in tiny.base().items() if not n.startswith("blocks.1.")}
    folder = tmp_path / "wan"
    tiny.write_original(folder / "diffusion_pytorch_model.safetensors", tensors)
    assert describe(open_checkpoint(folder))["complete"]  # one layer, for all that is known
    (folder / "config.json").write_text(json.dumps({"num_layers": 2, "num_heads": 4}))
    with pytest.raises(ValueError, match=r"27 are missing \(first: \['blocks.1.cross_attn.k.bias"):
        checked(open_checkpoint(folder))


class Trap:
    def __reduce__(self):
        return os.system, ("touch /tmp/trapped",)


def test_an_unsafe_pickle_is_refused_by_name_and_not_run(tmp_path, capsys):
    path = tmp_path / "lora.pt"
    torch.save({"generator": tiny.base(), "config": Trap()}, path)
    said = refused(capsys, "inspect", path)
    assert f"{path} is refused: it holds more than tensors" in said
    assert not Path("/tmp/trapped").exists()


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pt"])
def test_a_truncated_file_is_refused_by_name(name, tmp_path, capsys):
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(tiny.base(), path)
    else:
        tiny.write_original(path)
    for part in (0.9, 0.001):
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
        assert str(path) in refused(capsys, "inspect", path)


def test_faults_of_files_are_told(tmp_path, capsys):
    assert "no checkpoint at" in refused(capsys, "inspect", tmp_path / "none.pt")
    assert "0 safetensors files" in refused(capsys, "inspect", tmp_path)
    twice = {"model.head.head.bias": torch.zeros(2), "head.head.bias": torch.zeros(2)}
    save_file(twice, tmp_path / "twice.safetensors")
    assert "are both head.head.bias" in refused(capsys, "inspect", tmp_path / "twice.safetensors")
    torch.save({"optimizer": {"x": torch.zeros(1)}, "step": 1}, tmp_path / "odd.pt")
    assert "--key" in refused(capsys, "inspect", tmp_path / "odd.pt")
    assert "no part 'ema'" in refused(capsys, "inspect", tmp_path / "odd.pt", "--key", "ema")
    net = tmp_path / "net"
    tiny.diffusers_model().save_pretrained(net, max_shard_size="200KB")
    lost = sorted(net.glob("*-00002-*"))[0]
    lost.unlink()
    assert lost.name in refused(capsys, "inspect", net)


def test_an_export_neither_overwrites_nor_leaves_halves(tmp_path, capsys, monkeypatch):
    source = tiny.write_original(tmp_path / "wan.safetensors")
    out = tmp_path / "out.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("megatron_kvpo.checkpoint.export.write_file", flipped)
        said = refused(capsys, "export", source, out, "--to", "original", "--heads", 4)
        assert "blocks.0.ffn.0.weight reads back with other bits" in said
    assert not out.exists()
    assert not list(tmp_path.glob(".partial*"))
    call("export", source, out, "--to", "original", "--heads", 4)
    assert f"{out} exists" in refused(
        capsys, "export", source, out, "--to", "original", "--heads", 4
    )
    said = refused(capsys, "export", source, tmp_path / "a", "--to", "peft", "--heads", 4)
    assert "there is no adapter here" in said


def flipped(path, planned, note=None):
    tensors = {p.name: p.read() for p in planned}
    tensors["blocks.0.ffn.0.weight"][0, 0] *= -1
    save_file(tensors, path)
