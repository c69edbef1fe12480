"""The few-step stage does what it is for: the sampler's few steps come nearer to the data."""

from __future__ import annotations

import dataclasses

import torch

from megatron_kvpo import settings
from megatron_kvpo.config import RoutingConfig
from megatron_kvpo.parallel.seeds import generator, noise
from megatron_kvpo.records import LatentBatch, Prompt
from megatron_kvpo.rollout.sampler import generate_videos
from megatron_kvpo.rollout.stream import new_world
from megatron_kvpo.training.forcing import Forcing
from megatron_kvpo.training.learner import Learner
from megatron_kvpo.training.pretrain import PretrainConfig, empty_text
from tests.unit import small

ranks = small.ranks

FRAMES, TEXTS, ROWS, BASE_STEPS, STEPS = 15, 8, 32, 150, 60
CONFIG = settings.from_mapping(PretrainConfig, {
    "seed": 3,
    "device": "cpu",
    "model": {"hidden_dim": 48, "ffn_dim": 128, "num_layers": 2, "num_heads": 3, "text_dim": 16,
              "latent_channels": 4, "latent_height": 2, "latent_width": 2, "text_length": 4,
              "sinusoid_dim": 32, "max_frames": 32},
    "stream": {"num_frames": FRAMES, "resident_frames": FRAMES},
    "fitting": {"batch_size": ROWS, "caption_noise": 0.0, "ema_decay": 0.98, "sample_every": 0,
                "sampler_levels": 0.0},
    "optimizer": {"lr": 1e-2, "beta2": 0.99, "warmup_updates": 20},
})  # fmt: skip
FEW = dataclasses.replace(CONFIG.fitting, sampler_levels=1.0, own_history=0.5, own_states=0.5)

PLACE_KCHW = noise((TEXTS, 4, 2, 2), "start"), noise((TEXTS, 4, 2, 2), "quarter turn later")
TEXT_KXD = noise((TEXTS, 4, 16), "texts")


def clips() -> torch.Tensor:
    """What each text's video is: a turn in a plane of its own, .35 radians a latent frame."""
    angle = 0.35 * torch.arange(FRAMES).view(FRAMES, 1, 1, 1)
    one, other = (place[:, None] for place in PLACE_KCHW)
    return one * angle.cos() + other * angle.sin()


def batch(step: int) -> LatentBatch:
    told = torch.randint(TEXTS, (ROWS,), generator=generator("toy", step))
    return LatentBatch(
        latent_BFCHW=clips()[told], text_SXD=TEXT_KXD[told], index_B=told,
        segment_S3=torch.tensor([(row, 0, FRAMES) for row in range(ROWS)]),
    )  # fmt: skip


def rollout_error(learner: Learner) -> float:
    """Mean squared distance of videos of four steps a block from the data, whose variance is 1."""
    prompts = [Prompt(segments=(str(row % TEXTS),), index=row) for row in range(ROWS)]
    with learner.averaged():
        world = new_world(learner.model, CONFIG.stream, RoutingConfig(), ROWS)
        made = generate_videos(
            world, lambda texts: TEXT_KXD[[int(text) for text in texts]], prompts, [0] * ROWS, 9
        )
    return float((made - clips()[[row % TEXTS for row in range(ROWS)]]).square().mean())


def test_the_error_of_four_step_rollouts_falls_with_own_estimates(ranks):
    learner = Learner.build(CONFIG, ranks, empty_text(CONFIG))
    for step in range(BASE_STEPS):
        learner.train_step(batch(step), step, own=False, scale=1.0)
    before = {name: p.detach().clone() for name, p in learner.trained.items()}
    mean = {name: twin.clone() for name, twin in learner.average.twins.items()}
    base, errors = rollout_error(learner), {}
    for own, fitting in ((False, CONFIG.fitting), (True, FEW)):
        with torch.no_grad():
            for held, values in ((learner.trained, before), (learner.average.twins, mean)):
                for name, value in values.items():
                    held[name].copy_(value)
        config = dataclasses.replace(CONFIG, fitting=fitting)
        learner.forcing = Forcing(config, learner.model, empty_text(CONFIG))
        for step in range(BASE_STEPS, BASE_STEPS + STEPS):
            learner.train_step(batch(step), step, own=own, scale=0.5)
        errors[own] = rollout_error(learner)
    assert base < 0.1  # it has learned something
    assert errors[True] < 0.8 * base, (base, errors)
    assert errors[True] < 0.9 * errors[False], "plain training does as well"
