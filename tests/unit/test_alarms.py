"""Each alarm is silent on a healthy start and sounds, by its name, on the fault it is there for."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import NamedTuple

import pytest
import torch

from megatron_kvpo.config import AlarmsConfig
from megatron_kvpo.records import Energies
from megatron_kvpo.rollout import stream as stream_module
from megatron_kvpo.rollout.group import SampledGroup
from megatron_kvpo.training import alarms
from megatron_kvpo.training.alarms import AlarmError, check_gradients, check_start
from tests.unit import small

ranks = small.ranks


class Start(NamedTuple):
    """What train.py has in hand when it checks the start."""

    tiny: small.Small
    groups: list[SampledGroup]

    def energies(self, slot: str, update: int = 0) -> Energies:
        return self.tiny.stages.energies(update, self.groups, slot)

    def check(self, update: int = 0, **config) -> dict[str, float]:
        """As train.py: after a sync the current policy's energies are the old one's too."""
        current = self.energies("current", update)
        synced = self.tiny.policy.is_synced(update)
        old = current if synced else self.energies("old", update)
        return check_start(
            AlarmsConfig(**config), self.tiny.stages, update, self.groups, old, current
        )


def start(ranks, *overrides: str) -> Start:
    tiny = small.build(ranks, *overrides)
    if tiny.config.policy.mode == "lora":
        tiny.stir("current", size=0.05)
    tiny.policy.sync_old(0)
    return Start(tiny, tiny.stages.explore(0))


@pytest.fixture
def begun(ranks):
    return start(ranks)


HEALTHY = [
    (), ("policy.mode=full",), ("routing.exploration=noise",), ("routing.exploration=none",),
    ("stream.sampler=euler", "stream.context_noise=0.05"), ("energy.replay_context=self",),
    ("energy.temperature=0.01",), ("energy.grad_steps=1", "energy.space=x0"),
    ("model.fp8=[ffn,attention,text]",), ("policy.merge=true",),
    ("model.fp8=[ffn,attention,text]", "policy.merge=true", "model.dtype=bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", HEALTHY)
def test_a_healthy_start_passes_with_exact_figures_and_leaves_no_trace(ranks, overrides):
    begun = start(ranks, *overrides)
    tiny = begun.tiny
    weights = [p.detach().clone() for p in tiny.model.parameters()]
    free = tiny.world.pool.num_free
    figures = begun.check()
    assert figures["ratio"] == figures["anchor_energy"] == figures["prefix_pages"] == 0
    assert figures["adapter"] > 1e-3
    pairs = zip(tiny.model.parameters(), weights, strict=True)
    assert all(torch.equal(p, kept) for p, kept in pairs), "an alarm moved weights"
    assert check_gradients(AlarmsConfig(), tiny.stages) == 0
    assert tiny.world.pool.num_free == free, "an alarm took pages"
    for sampled in begun.groups:
        sampled.release()
    assert tiny.world.pool.num_free == tiny.num_pages, "an alarm still holds pages"


def test_a_run_resumed_between_syncs_passes_although_the_policies_differ(ranks):
    begun = start(ranks, "policy.rollouts_per_policy_sync=2")
    begun.tiny.stir("current")
    assert begun.energies("current")[1].min() > 0
    assert begun.check(update=1)["anchor_energy"] == 0


def test_switched_off_alarms_look_at_nothing(begun, monkeypatch):
    stages = begun.tiny.stages
    monkeypatch.setattr(stages.policy.optimizer, "check_gradients_equal", lambda: 1.0)
    off = AlarmsConfig(enabled=False)
    bad = Energies(torch.full((2, 3), torch.nan), torch.ones(2))
    assert check_start(off, stages, 0, begun.groups, bad, bad) == {}
    assert check_gradients(off, stages) == 0


def sounds(begun: Start, name: str, update: int = 0, **config) -> str:
    """The message of the alarm `name`, which must sound."""
    with pytest.raises(AlarmError, match=f"^alarm {name}: ") as error:
        begun.check(update, **config)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def test_pages_spoiled_after_the_rollout_sound_the_anchors_alarm(begun):
    pages = list(begun.groups[0].prefix.tables[0].pages.values())
    begun.tiny.world.pool.key[:, pages[-1]] += 0.1
    assert "limit 1e-09" in sounds(begun, "anchor energy")


def test_a_replay_in_another_window_sounds_the_anchors_alarm(begun, monkeypatch):
    plain = stream_module.plain_context
    monkeypatch.setattr(
        stream_module, "plain_context", lambda frame, config: plain(frame, config)[1:]
    )
    sounds(begun, "anchor energy")


def test_a_replay_in_the_routed_context_sounds_the_anchors_alarm(begun, monkeypatch):
    """The reference's fault turned round: every replayed row sees a branch's frames."""
    velocity, route = stream_module.Stream.velocity, (3, 4, 5, 6, 8)
    monkeypatch.setattr(
        stream_module.Stream, "velocity",
        lambda self, state, sigma, _=None: velocity(self, state, sigma, [route] * len(state)),
    )  # fmt: skip
    sounds(begun, "anchor energy")


def test_a_replay_under_another_text_sounds_the_anchors_alarm(begun):
    encode = begun.tiny.stages.encode
    begun.tiny.stages.encode = lambda texts: encode([small.TEXTS[1]] * len(texts))
    sounds(begun, "anchor energy")


def test_a_replay_with_other_context_noise_sounds_the_anchors_alarm(ranks, monkeypatch):
    begun = start(ranks, "stream.context_noise=0.05")
    noises = begun.tiny.stages.noises
    monkeypatch.setattr(
        begun.tiny.stages, "noises", lambda update, index: noises(update + 1, index)
    )
    sounds(begun, "anchor energy")


def test_a_sampling_policy_that_is_not_the_current_one_sounds_an_alarm(ranks, monkeypatch):
    tiny = small.build(ranks)
    monkeypatch.setattr(tiny.policy.bank, "copy", lambda source, target: None)  # the sync is lost
    tiny.stir("current", size=0.05)
    tiny.policy.sync_old(0)
    sounds(Start(tiny, tiny.stages.explore(0)), "(ratio|anchor energy)")


def test_energies_of_two_laws_sound_the_ratio_alarm(begun):
    """What the loss would call old and current differ although nothing was trained."""
    old = begun.energies("old")
    begun.tiny.stir("current")
    current = begun.energies("current")._replace(anchor_P=old.anchor_P)
    with pytest.raises(AlarmError, match=r"^alarm ratio: .*off 1 by [\d.]+, the limit is 1e-05"):
        check_start(AlarmsConfig(), begun.tiny.stages, 0, begun.groups, old, current)


@pytest.mark.parametrize("update", [0, 1])
def test_a_replay_that_does_not_repeat_itself_sounds_the_ratio_alarm(ranks, monkeypatch, update):
    """At a sync too, where train.py hands over one replay as both policies'."""
    begun = start(ranks, "policy.rollouts_per_policy_sync=2")
    energies, drawn = begun.tiny.stages.energies, iter(range(9))

    def restless(*arguments):
        found = energies(*arguments)
        shift_G = next(drawn) * torch.tensor([0.0, 0.01, 0.02])
        return found._replace(branch_PG=found.branch_PG + shift_G)

    monkeypatch.setattr(begun.tiny.stages, "energies", restless)
    sounds(begun, "ratio", update)


def test_the_ratios_limit_scales_with_the_temperature(ranks):
    """Energies off by rounding, 1e-6, make ratios off by 1e-3 at temperature 0.001."""
    begun = start(ranks, "energy.temperature=0.001")
    old = begun.energies("old")
    current = old._replace(branch_PG=old.branch_PG + torch.tensor([0.0, 1e-6, -1e-6]))
    check_start(AlarmsConfig(), begun.tiny.stages, 0, begun.groups, old, current)
    with pytest.raises(AlarmError, match="alarm ratio"):
        check_start(AlarmsConfig(ratio_tolerance=1e-8), begun.tiny.stages, 0, begun.groups, old,
                    current)  # fmt: skip


def test_an_adapter_that_trains_but_does_not_act_sounds_its_alarm(ranks, monkeypatch):
    tiny = small.build(ranks)
    monkeypatch.setattr(tiny.policy.bank, "use", lambda slot: contextlib.nullcontext())
    sounds(Start(tiny, tiny.stages.explore(0)), "adapter")


def test_prefix_latents_that_differ_between_branches_sound_the_prefix_alarm(begun):
    sampled = begun.groups[1]
    latent = sampled.group.latent_NFCHW.clone()
    latent[1, 2, 0, 0, 0] += 0.25
    group = dataclasses.replace(sampled.group, latent_NFCHW=latent)
    begun.groups[1] = SampledGroup(group, sampled.prefix)
    assert "by 0.25 (limit 0)" in sounds(begun, "prefix pages")


def test_prefix_pages_that_differ_between_ranks_sound_the_prefix_alarm(begun, monkeypatch):
    """Even where the bits differ and the numbers hardly do."""
    shapes = []

    def unequal(held, axis):
        shapes.append(tuple(held.shape))
        return False, 1e-12

    monkeypatch.setattr(alarms, "all_equal", unequal)
    sounds(begun, "prefix pages")
    forks = [sampled.group.plan.fork_frame for sampled in begun.groups]
    layers = [(kind, layer) for kind in ("key", "value") for layer in range(2)]
    assert shapes == [(fork, 4, 2, 16) for fork in forks for _ in layers]


def test_energies_that_are_no_numbers_sound_an_alarm(begun):
    branches, anchors, _ = begun.energies("old")
    nan = torch.nan
    for bad in (Energies(branches * nan, anchors), Energies(branches, anchors * nan)):
        with pytest.raises(AlarmError):
            check_start(AlarmsConfig(), begun.tiny.stages, 0, begun.groups, bad, bad)


def test_gradients_that_differ_between_replicas_sound_theirs(begun, monkeypatch):
    stages = begun.tiny.stages
    monkeypatch.setattr(stages.policy.optimizer, "check_gradients_equal", lambda: 5e-324)
    with pytest.raises(AlarmError, match=r"^alarm gradients: .* by 4\.94e-324"):
        check_gradients(AlarmsConfig(), stages)
