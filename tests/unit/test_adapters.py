"""Adapters in PEFT's format: the same numbers there and here, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_kvpo.checkpoint.adapters import (
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from megatron_kvpo.checkpoint.convert import load_base, relative_error
from megatron_kvpo.checkpoint.formats import open_checkpoint
from megatron_kvpo.checkpoint.mapping import is_adapter
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import SLOTS, Adapter, AdapterBank
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.parallel.seeds import noise
from tests.unit import small
from tests.unit import tiny_checkpoints as tiny
from tools.convert_checkpoint import main

ranks = small.ranks

SIZES = ("model.sinusoid_dim=32", "model.hidden_dim=64", "model.ffn_dim=96", "model.num_heads=4")


def build(ranks, rank: int = tiny.SIZES.rank, alpha: float = tiny.ALPHA) -> CausalWan:
    config = small.config(*SIZES, f"policy.lora_rank={rank}", f"policy.lora_alpha={alpha}")
    return CausalWan(config.model, Spec.build(config.model, config.parallel, ranks, config.policy))


@pytest.fixture
def model(ranks, tmp_path):
    """The tiny base, the tiny adapter in every slot."""
    made = build(ranks)
    base_file, lora_file = tiny.write_longlive(tmp_path / "longlive")
    load_base(made, base_file)
    load_adapter(made, lora_file)
    return made


def halves(model: CausalWan, slot: str) -> dict[str, torch.Tensor]:
    return {
        f"{name.removesuffix('.adapter')}.lora_{half}": table[slot].detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, Adapter)
        for half, table in (("A", module.lora_A), ("B", module.lora_B))
    }


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@torch.no_grad()
def velocity(model: CausalWan, slot: str | None) -> torch.Tensor:
    """The input of tiny.run."""
    with AdapterBank(model, model.spec.switch).use(slot):
        text = model.encode_text(noise((1, 5, 16), "text"))
        latent = noise((1, 4, 3, 4, 4), "latent").transpose(1, 2)
        return model(latent, torch.full((1, 1), 8.0), range(3), text).transpose(1, 2)


def test_longlives_adapter_fills_the_slots_asked_for(ranks, model, tmp_path):
    for slot in SLOTS:
        assert equal(halves(model, slot), tiny.adapter())
    other = build(ranks)
    load_adapter(other, tmp_path / "longlive/lora.pt", ["old"])
    assert equal(halves(other, "old"), tiny.adapter())
    assert not any(value.any() for value in halves(other, "current").values())


@pytest.mark.parametrize("keys", ["original", "diffusers"])
def test_a_saved_adapter_comes_back_bit_for_bit(ranks, model, tmp_path, keys):
    for _ in range(2):  # the second replaces the first
        save_adapter(model, "ema", tmp_path / "adapter", keys)
    other = build(ranks)
    load_adapter(other, tmp_path / "adapter", ["current", "old"])
    assert equal(halves(other, "current"), tiny.adapter())
    assert equal(halves(other, "old"), tiny.adapter())
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)


class Layers(nn.Module):
    """The linear layers of a model's blocks, named as they are, plain."""

    def __init__(self, model: CausalWan) -> None:
        super().__init__()
        for name, module in model.named_modules():
            if not isinstance(module, Adapter):
                continue
            layer = model.get_submodule(name.removesuffix(".adapter"))
            plain = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
            plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
            *path, last = name.removesuffix(".adapter").split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(last, plain)


def test_every_layer_equals_pefts(model, tmp_path):
    from peft import PeftModel

    save_adapter(model, "current", tmp_path / "adapter", "original")
    theirs = PeftModel.from_pretrained(Layers(model), str(tmp_path / "adapter"))
    modules = [n.removesuffix(".adapter") for n, m in model.named_modules()
               if isinstance(m, Adapter)]  # fmt: skip
    assert len(modules) == 20
    for name in modules:
        layer = model.get_submodule(name)
        x = noise((7, 1, layer.weight.shape[1]), "x", name)
        with torch.no_grad(), AdapterBank(model, model.spec.switch).use("current"):
            ours = layer(x)
        assert relative_error(ours, theirs.base_model.model.get_submodule(name)(x)) < 1e-6
        bare = nn.functional.linear(x, layer.weight, layer.bias)
        assert relative_error(ours, bare) > 1e-2, "the adapter does nothing"


def test_peft_and_diffusers_load_the_folder_and_give_our_output(model, tmp_path):
    from diffusers.loaders import WanLoraLoaderMixin
    from peft import PeftModel

    class Pipeline(WanLoraLoaderMixin):
        """What load_lora_weights needs of a pipeline."""

        components: dict = {}  # noqa: RUF012
        hf_device_map = None

        def __init__(self, transformer: nn.Module) -> None:
            self.transformer = transformer

    save_adapter(model, "current", tmp_path / "adapter")
    ours, bare = velocity(model, "current"), velocity(model, None)
    net = PeftModel.from_pretrained(tiny.diffusers_model(), str(tmp_path / "adapter"))
    assert relative_error(tiny.run(net), ours) < 5e-6
    assert relative_error(bare, ours) > 1e-2

    net = tiny.diffusers_model()
    Pipeline(net).load_lora_weights(tmp_path / "adapter")
    assert relative_error(tiny.run(net), ours) < 5e-6

    arguments = ["export", tmp_path / "adapter", tmp_path / "comfy.safetensors", "--to", "comfyui"]
    assert main([str(a) for a in arguments]) == 0
    written = load_file(tmp_path / "comfy.safetensors")
    assert all(name.startswith("diffusion_model.blocks.") for name in written)
    assert len(written) == 60
    net = tiny.diffusers_model()
    Pipeline(net).load_lora_weights(tmp_path / "comfy.safetensors")
    assert relative_error(tiny.run(net), ours) < 5e-6


def test_peft_may_make_the_adapter(ranks, model, tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False)
    net = get_peft_model(tiny.diffusers_model(), config).eval()
    net.save_pretrained(tmp_path / "theirs")
    ours = build(ranks, rank=3, alpha=5)
    load_base(ours, tmp_path / "longlive/longlive_base.pt")
    load_adapter(ours, tmp_path / "theirs")
    assert relative_error(velocity(ours, "reference"), tiny.run(net)) < 5e-6
    tensors = net.get_base_model().state_dict()
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "all.safetensors")
    whole = open_checkpoint(tmp_path / "all.safetensors")  # base and adapter in one, as PEFT nests
    assert whole.has_base
    assert whole.has_adapter
    assert sum(is_adapter(name) for name in whole.stored) == 40
    assert not whole.foreign


def test_merging_gives_the_adapters_output_and_unmerging_every_bit(model):
    base, adapted = velocity(model, None), velocity(model, "current")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = merge_adapter(model, "current")
    assert len(kept) == 20
    assert relative_error(velocity(model, None), adapted) < 5e-6
    assert relative_error(base, adapted) > 1e-2
    unmerge_adapter(model, kept)
    assert equal({name: p.detach() for name, p in model.named_parameters()}, before)
    assert torch.equal(velocity(model, None), base)


def edited(source: Path, target: Path, change) -> Path:
    """A copy of an adapter folder whose tensors `change` has edited in place."""
    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_what_does_not_fit_is_refused_and_changes_nothing(ranks, model, tmp_path):
    save_adapter(model, "current", tmp_path / "adapter", "original")
    path = tmp_path / "adapter"
    fresh = build(ranks)

    with pytest.raises(ValueError, match=r"has rank \[4\], policy.lora_rank is 8"):
        load_adapter(build(ranks, rank=8), path)
    with pytest.raises(ValueError, match=r"has alpha 6, policy.lora_alpha is 4"):
        load_adapter(build(ranks, alpha=4), path)
    stem = "base_model.model.blocks.1.ffn.2"
    lacking = edited(path, tmp_path / "lacking", lambda t: t.pop(f"{stem}.lora_B.weight"))
    with pytest.raises(ValueError, match=r"1 are missing \(first: \['blocks.1.ffn.2.lora_B'\]"):
        load_adapter(fresh, lacking)
    more = edited(path, tmp_path / "more", lambda t: t.update(
        {"base_model.model.head.head.lora_A.weight": torch.zeros(4, 64)}))  # fmt: skip
    with pytest.raises(ValueError, match=r"1 others .*base_model.model.head.head.lora_A.weight"):
        load_adapter(fresh, more)
    bent = edited(path, tmp_path / "bent", lambda t: t.update(
        {f"{stem}.lora_B.weight": torch.zeros(63, 4)}))  # fmt: skip
    with pytest.raises(ValueError, match=r"blocks.1.ffn.2.lora_B is \[63, 4\], .*needs \[64, 4\]"):
        load_adapter(fresh, bent)
    with pytest.raises(ValueError, match="holds no adapter"):
        load_adapter(fresh, tiny.write_original(tmp_path / "base.safetensors"))
    with pytest.raises(ValueError, match="no adapter slot 'best'"):
        load_adapter(fresh, path, ["best"])
    assert not any(v.any() for slot in SLOTS for v in halves(fresh, slot).values())


def test_what_is_more_than_plain_lora_is_refused(model, tmp_path):
    save_adapter(model, "current", tmp_path / "adapter", "original")
    file = tmp_path / "adapter/adapter_config.json"
    plain = json.loads(file.read_text())
    for name, value in (("use_rslora", True), ("use_dora", True), ("bias", "all"),
                        ("rank_pattern", {"q": 2}), ("init_lora_weights", "pissa")):  # fmt: skip
        file.write_text(json.dumps({**plain, name: value}))
        with pytest.raises(ValueError, match=f"sets {name} to"):
            load_adapter(model, tmp_path / "adapter")


def test_an_adapter_does_not_replace_another_thing(model, tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match="is no adapter"):
        save_adapter(model, "current", tmp_path / "results")
