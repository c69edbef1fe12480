"""Four policies on one set of weights: which one acts, how they are copied and mixed."""

from __future__ import annotations

import pytest
import torch

from megatron_kvpo.checkpoint.adapters import save_adapter
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import SLOTS, AdapterBank, FullBank, Switch
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.parallel.seeds import noise
from tests.unit import small

ranks = small.ranks


@pytest.fixture
def lora(ranks):
    return small.build(ranks)


@pytest.fixture
def full(ranks):
    return small.build(ranks, "policy.mode=full")


def velocity(tiny: small.Small, slot: str | None) -> torch.Tensor:
    with tiny.policy.bank.use(slot), torch.no_grad():
        text = tiny.model.encode_text(tiny.encode(small.TEXTS[:1]))
        return tiny.model(tiny.latents(3), torch.full((1, 1), 800.0), range(3), text)


def bits(tiny: small.Small) -> dict[str, torch.Tensor]:
    names = dict(tiny.model.named_parameters())
    if isinstance(tiny.policy.bank, FullBank):
        names |= dict(tiny.policy.bank.named_parameters())
    return {name: p.detach().clone() for name, p in names.items()}


@torch.no_grad()
def move(tiny: small.Small, size: float = 0.05) -> None:
    """Change the current policy as an optimizer would: in place."""
    for name, p in tiny.policy.trained().items():
        p.add_(size * noise(tuple(p.shape), "move", name))


def test_an_adapter_at_its_start_is_the_base_bit_for_bit(lora):
    base = velocity(lora, None)
    assert all(torch.equal(velocity(lora, slot), base) for slot in SLOTS)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_only_the_policy_that_moved_acts_differently(ranks, mode):
    tiny = small.build(ranks, f"policy.mode={mode}")
    before = velocity(tiny, "old")
    move(tiny)
    assert not torch.equal(velocity(tiny, "current"), before)
    for slot in ("old", "reference", "ema", None):
        assert torch.equal(velocity(tiny, slot), before), slot


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_copy_makes_one_policy_the_other_and_no_third(ranks, mode):
    tiny = small.build(ranks, f"policy.mode={mode}")
    before = velocity(tiny, "reference")
    move(tiny)
    tiny.policy.bank.copy("current", "old")
    assert torch.equal(velocity(tiny, "old"), velocity(tiny, "current"))
    assert torch.equal(velocity(tiny, "reference"), before)
    move(tiny)
    assert not torch.equal(velocity(tiny, "old"), velocity(tiny, "current")), "they share storage"


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_blend_keeps_a_share_of_the_target(ranks, mode):
    tiny = small.build(ranks, f"policy.mode={mode}")
    move(tiny)
    if mode == "lora":
        adapters = tiny.policy.bank.adapters.values()
        tables = [table for a in adapters for table in (a.lora_A, a.lora_B)]
        pairs = [(table["current"], table["ema"]) for table in tables]
    else:
        slot = tiny.policy.bank.slots["ema"]
        names = dict(tiny.model.named_parameters())
        pairs = [(p, slot[name.replace(".", "/")]) for name, p in names.items()]
    expected = [0.9 * ema.double() + 0.1 * current.double() for current, ema in pairs]
    currents = [current.clone() for current, _ in pairs]
    tiny.policy.bank.blend("current", "ema", 0.9)
    for (current, ema), value, kept in zip(pairs, expected, currents, strict=True):
        torch.testing.assert_close(ema.double(), value, rtol=1e-6, atol=1e-7)
        assert torch.equal(current, kept)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_acting_leaves_every_bit_as_it_was(ranks, mode):
    tiny = small.build(ranks, f"policy.mode={mode}")
    move(tiny)
    before, place = bits(tiny), {n: p.data_ptr() for n, p in tiny.model.named_parameters()}
    for slot in (*SLOTS, None):
        velocity(tiny, slot)
    with pytest.raises(RuntimeError, match="inside"), tiny.policy.bank.use("old"):
        raise RuntimeError("inside")
    after = bits(tiny)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert place == {n: p.data_ptr() for n, p in tiny.model.named_parameters()}, (
        "the optimizer's parameters lie elsewhere now"
    )


def test_a_policy_inside_another_gives_way_at_the_end(lora):
    lora.stir("current", "old")
    switch = lora.policy.bank.switch
    with lora.policy.bank.use("old"):
        with lora.policy.bank.use("current"):
            assert switch.slot == "current"
        assert switch.slot == "old"
    assert switch.slot is None


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_current_policy_can_be_asked_for_while_another_acts(ranks, mode):
    tiny = small.build(ranks, f"policy.mode={mode}")
    move(tiny)
    current = velocity(tiny, "current")
    with tiny.policy.bank.use("old"):
        assert torch.equal(velocity(tiny, "current"), current)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_unknown_slot_is_refused_by_name(ranks, mode):
    tiny = small.build(ranks, f"policy.mode={mode}")
    with pytest.raises(ValueError, match="slot 'best'"), tiny.policy.bank.use("best"):
        pass


def test_a_model_without_adapters_has_no_bank(full):
    with pytest.raises(ValueError, match=r"set policy\.mode to lora"):
        AdapterBank(full.model, Switch())


def test_an_adapter_is_on_every_linear_layer_of_a_block_and_nowhere_else(lora):
    modules = [f"{a}.{m}" for a in ("self_attn", "cross_attn") for m in "qkvo"]
    layers = range(lora.config.model.num_layers)
    expected = {f"blocks.{i}.{m}.adapter" for i in layers for m in [*modules, "ffn.0", "ffn.2"]}
    assert set(lora.policy.bank.adapters) == expected


@pytest.mark.parametrize("rank", [1, 4])
def test_an_adapter_equals_the_merged_weights(ranks, rank):
    """(W + alpha / rank B A) x, with bias, in every layer at once."""
    tiny = small.build(ranks, f"policy.lora_rank={rank}", "policy.lora_alpha=6")
    tiny.stir("current", size=0.05)
    config = tiny.config
    merged = CausalWan(config.model, Spec.build(config.model, config.parallel, ranks, None))
    with torch.no_grad():
        merged.load_state_dict(tiny.model.state_dict(), strict=False)
        for name, adapter in tiny.policy.bank.adapters.items():
            weight = merged.get_submodule(name.removesuffix(".adapter")).weight
            weight += (6 / rank) * adapter.lora_B["current"] @ adapter.lora_A["current"]
        text = merged.encode_text(tiny.encode(small.TEXTS[:1]))
        theirs = merged(tiny.latents(3), torch.full((1, 1), 800.0), range(3), text)
    ours = velocity(tiny, "current")
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert float((ours - velocity(tiny, None)).abs().max()) > 1e-2, "the adapter does nothing"


def test_a_run_continues_the_adapter_it_is_given(ranks, tmp_path):
    """policy.adapter fills every slot: the reference of the KL and of the drift is the adapter."""
    first = small.build(ranks)
    first.stir("current")
    save_adapter(first.model, "current", tmp_path / "adapter")
    second = small.build(ranks, f"policy.adapter={tmp_path / 'adapter'}")
    for name, adapter in second.policy.bank.adapters.items():
        for slot in SLOTS:
            for half in ("lora_A", "lora_B"):
                theirs = getattr(first.policy.bank.adapters[name], half)["current"]
                assert torch.equal(getattr(adapter, half)[slot], theirs), (name, slot)
    groups = second.stages.explore(0)
    energies = [second.stages.energies(0, groups, slot).branch_PG for slot in SLOTS]
    assert all(torch.equal(energies[0], other) for other in energies[1:])
    for sampled in groups:
        sampled.release()


def test_an_adapter_of_another_rank_is_refused_at_the_start(ranks, tmp_path):
    save_adapter(small.build(ranks).model, "current", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"policy\.lora_rank is 7"):
        small.build(ranks, f"policy.adapter={tmp_path / 'adapter'}", "policy.lora_rank=7")


def test_an_adapter_cannot_be_continued_as_full_weights(tmp_path):
    with pytest.raises(ValueError, match=r"policy\.mode full: merge it first"):
        small.config(f"policy.adapter={tmp_path}", "policy.mode=full")
