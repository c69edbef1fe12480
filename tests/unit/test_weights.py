"""Weights come and go by name, whole, and what does not fit is refused by name."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_kvpo.checkpoint.convert import load_base
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import (
    bare_name,
    base_parameters,
    initialise,
    initialise_adapters,
    load_weights,
    save_weights,
)
from tests.unit import small

ranks = small.ranks


def bare(ranks, *overrides: str) -> CausalWan:
    config = small.config(*overrides)
    return CausalWan(config.model, Spec.build(config.model, config.parallel, ranks, None))


def adapted(ranks) -> CausalWan:
    config = small.config()
    return CausalWan(config.model, Spec.build(config.model, config.parallel, ranks, config.policy))


def values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in base_parameters(model)}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def saved(ranks, tmp_path):
    """A model and the file it was written to."""
    model = bare(ranks)
    small.enliven(model)
    path = tmp_path / "deep" / "model.safetensors"
    save_weights(model, path, torch.float32, {"made": "for a test"})
    return model, path


def test_a_file_gives_back_every_bit_and_its_note(saved, ranks):
    model, path = saved
    other = bare(ranks)
    load_base(other, path)
    assert same(values(model), values(other))
    with safe_open(path, "pt") as file:
        assert file.metadata()["made"] == "for a test"


def test_names_are_those_of_the_released_weights(saved):
    names = set(load_file(saved[1]))
    block = {
        "modulation", "norm3.weight", "norm3.bias", "ffn.0.weight", "ffn.0.bias", "ffn.2.weight",
        "ffn.2.bias",
        *(f"{a}.{m}.{p}" for a in ("self_attn", "cross_attn") for m in "qkvo"
          for p in ("weight", "bias")),
        *(f"{a}.norm_{m}.weight" for a in ("self_attn", "cross_attn") for m in "qk"),
    }  # fmt: skip
    outside = {
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0",
        "time_embedding.2", "time_projection.1", "head.head",
    }  # fmt: skip
    expected = {f"{n}.{p}" for n in outside for p in ("weight", "bias")} | {"head.modulation"}
    assert names == expected | {f"blocks.{i}.{n}" for i in range(2) for n in block}


def count(hidden: int, ffn: int, layers: int, channels: int, text: int, sinusoid: int) -> int:
    """Parameters of causal Wan with patches of 1 x 2 x 2."""
    square, patch = hidden * hidden + hidden, 4 * channels
    block = 8 * square + 2 * hidden * ffn + ffn + hidden + (4 + 2 + 6) * hidden
    embed = patch * hidden + hidden + text * hidden + hidden + square
    time = sinusoid * hidden + hidden + square + 6 * square
    return layers * block + embed + time + hidden * patch + patch + 2 * hidden


def test_the_parameters_are_as_many_as_the_released_ones(ranks):
    model, sizes = bare(ranks), small.config().model
    assert sum(p.numel() for p in model.parameters()) == count(
        sizes.hidden_dim, sizes.ffn_dim, sizes.num_layers, sizes.latent_channels, sizes.text_dim,
        sizes.sinusoid_dim,
    )  # fmt: skip
    assert count(1536, 8960, 30, 16, 4096, 256) == 1_418_996_800
    assert len(list(model.parameters())) == 27 * sizes.num_layers + 15  # 825 at 30 layers


def test_adapters_are_not_saved_with_the_base(ranks, tmp_path):
    model = adapted(ranks)
    initialise(model, 1)
    initialise_adapters(model, 1)
    save_weights(model, tmp_path / "w.safetensors", torch.float32, {})
    read = load_file(tmp_path / "w.safetensors")
    assert not [name for name in read if "lora" in name]
    other = bare(ranks)
    load_weights(other, read, "file")
    assert same(values(other), values(model))


def test_a_file_may_be_narrower_than_the_model(saved, ranks, tmp_path):
    model, _ = saved
    save_weights(model, tmp_path / "half.safetensors", torch.bfloat16, {})
    other = bare(ranks)
    load_base(other, tmp_path / "half.safetensors")
    for name, value in values(other).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, values(model)[name].bfloat16().float())


@pytest.mark.parametrize("prefix", ["model.", "generator.model.", "generator_ema.model.",
                                    "model._fsdp_wrapped_module.", "model.diffusion_model.",
                                    "base_model.model."])  # fmt: skip
def test_names_of_wrappers_are_stripped(saved, ranks, tmp_path, prefix):
    tensors = {f"{prefix}{name}": value for name, value in load_file(saved[1]).items()}
    save_file(tensors, tmp_path / "wrapped.safetensors")
    other = bare(ranks)
    load_base(other, tmp_path / "wrapped.safetensors")
    assert same(values(other), values(saved[0]))


def test_wrappers_inside_a_name_are_stripped():
    wrapped = "model._orig_mod.blocks.3._fsdp_wrapped_module.self_attn.q.base_layer.weight"
    assert bare_name(wrapped) == "blocks.3.self_attn.q.weight"


def test_a_tensor_that_comes_twice_is_refused(saved, ranks, tmp_path):
    tensors = load_file(saved[1])
    tensors["generator_ema.head.head.bias"] = tensors["head.head.bias"] + 1
    save_file(tensors, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match=r"twice.*head.head.bias"):
        load_base(bare(ranks), tmp_path / "twice.safetensors")


def test_a_missing_and_a_foreign_tensor_are_named_with_their_file(saved, ranks):
    tensors = load_file(saved[1])
    tensors["blocks.0.ffn.1.weight"] = tensors.pop("blocks.1.ffn.2.bias")
    initialise(other := bare(ranks), 0)
    before = values(other)
    with pytest.raises(ValueError, match="1 tensors missing") as error:
        load_weights(other, tensors, "w.safetensors")
    for part in ("w.safetensors", "blocks.1.ffn.2.bias", "1 unknown", "blocks.0.ffn.1.weight"):
        assert part in str(error.value)
    assert same(values(other), before), "a refused file changed the model"


def test_a_misshapen_tensor_is_named_with_both_shapes(saved, ranks):
    tensors = load_file(saved[1])
    tensors["head.head.weight"] = torch.zeros(3, 5)
    initialise(other := bare(ranks), 0)
    before = values(other)
    with pytest.raises(ValueError, match=r"head\.head\.weight is \[3, 5\].*needs \[16, 32\]"):
        load_weights(other, tensors, "w.safetensors")
    assert same(values(other), before), "a refused file changed the model"


def test_a_model_of_another_depth_is_refused(saved, ranks):
    with pytest.raises(ValueError, match="27 tensors missing"):
        load_weights(bare(ranks, "model.num_layers=3"), load_file(saved[1]), "file")


def test_a_file_that_is_not_there_or_not_readable_is_named(ranks, tmp_path):
    with pytest.raises(ValueError, match=r"no file at .*none\.safetensors"):
        load_base(bare(ranks), tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no such format")
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a whole safetensors"):
        load_base(bare(ranks), tmp_path / "bad.safetensors")


def test_a_seed_names_the_initial_weights(ranks):
    models = [bare(ranks) for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.manual_seed(torch.seed())  # the global generator has no part in it
        initialise(model, seed)
    first, again, other = (values(model) for model in models)
    assert same(first, again)
    matrices = [n for n in first if n.endswith("weight") and "norm" not in n]
    assert not any(torch.equal(first[n], other[n]) for n in matrices)


def test_the_initial_weights_of_a_layer_do_not_depend_on_the_other_layers(ranks):
    shallow, deep = bare(ranks), bare(ranks, "model.num_layers=3")
    initialise(shallow, 3)
    initialise(deep, 3)
    assert all(torch.equal(value, values(deep)[name]) for name, value in values(shallow).items())


def test_initial_norms_are_one_biases_zero_and_matrices_bounded(ranks):
    model = bare(ranks)
    initialise(model, 3)
    for name, value in values(model).items():
        if "norm" in name and name.endswith("weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith(("q.weight", "ffn.0.weight")):
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
        else:
            assert value.any(), name


def test_adapters_start_alike_in_all_slots_and_freeze_the_base(ranks):
    model = adapted(ranks)
    initialise_adapters(model, 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith(".current")}
    named = dict(model.named_parameters())
    drawn = set()
    for name in trained:
        slots = [named[name.replace(".current", f".{slot}")] for slot in ("old", "reference")]
        assert all(torch.equal(p, named[name]) for p in slots)
        if ".lora_B." in name:
            assert not named[name].any()
        else:
            bound = named[name].shape[1] ** -0.5  # kaiming-uniform, a = sqrt 5
            assert 0.8 * bound < named[name].abs().max() <= bound
            drawn.add(float(named[name].flatten()[0]))
    assert len(drawn) == 2 * 10, "two layers drew the same adapter"
