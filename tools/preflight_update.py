"""The recipe at a size that any machine trains in seconds: what tools/preflight.py updates once."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path

from megatron_kvpo import log
from megatron_kvpo.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LogConfig,
    RewardConfig,
    RunConfig,
    StreamConfig,
)
from megatron_kvpo.parallel.groups import check_sizes
from megatron_kvpo.routing import legal_forks
from megatron_kvpo.train import train_step
from megatron_kvpo.training.metrics import Metrics
from megatron_kvpo.training.run import Run

_PROMPT = {"segments": ["a red square moves right"]}
_LAYERS, _PATCHES, _TEXT_DIM, _TEXT_LENGTH, _RANK = 2, 4, 64, 32, 16
_CPU_HEAD_DIM = 16
_LIMIT_S = 120


def reduced(config: RunConfig, world: int, folder: Path, *, gpu: bool) -> RunConfig:
    """The same layout, heads, types, method and alarms on two layers and 4 x 4 patches a frame.

    Random weights, the shapes world's texts and codec, one measured reward, the shortest video that
    has a fork. On a GPU heads keep their size, for the sake of their kernels.
    """
    model, num_data = config.model, check_sizes(world, config.parallel)
    head_dim = model.head_dim if gpu else min(model.head_dim, _CPU_HEAD_DIM)
    (folder / "prompts.jsonl").write_text((json.dumps(_PROMPT) + "\n") * num_data)
    return dataclasses.replace(
        config, name="update", folder=folder, num_updates=1,
        model=dataclasses.replace(
            model, preset=None, weights=None, num_layers=_LAYERS,
            hidden_dim=model.num_heads * head_dim, ffn_dim=2 * model.num_heads * head_dim,
            latent_height=_PATCHES * model.patch[1], latent_width=_PATCHES * model.patch[2],
            text_dim=_TEXT_DIM, text_length=_TEXT_LENGTH,
        ),
        codec=dataclasses.replace(config.codec, vae=None, weights=None, max_rows=None),
        stream=_shortest(config),
        policy=dataclasses.replace(
            config.policy, adapter=None, groups_per_update=num_data,
            lora_rank=min(config.policy.lora_rank, _RANK),
        ),
        optimizer=dataclasses.replace(config.optimizer, warmup_updates=0),
        parallel=dataclasses.replace(
            config.parallel, timeout_s=min(config.parallel.timeout_s, _LIMIT_S)
        ),
        reward=RewardConfig(weights={"temporal_consistency": 1.0}),
        data=DataConfig(prompts=folder / "prompts.jsonl"),
        evaluation=EvaluationConfig(), checkpoint=CheckpointConfig(every=0, resume=False),
        log=LogConfig(wandb="disabled", costs=False, samples_every=0, report=False),
    )  # fmt: skip


def _shortest(config: RunConfig) -> StreamConfig:
    """The stream with the fewest latent frames that a group can fork in."""
    block = config.stream.block_frames
    for num_frames in range(block, config.stream.num_frames, block):
        stream = dataclasses.replace(config.stream, num_frames=num_frames)
        try:
            legal_forks(stream, config.routing)
        except ValueError:
            continue
        return stream
    return config.stream


def update_s(config: RunConfig, world: int, *, gpu: bool) -> float:
    """Seconds of one update of the reduced recipe, its alarms on. Collective.

    ValueError and RuntimeError: as a run raises them.
    """
    with tempfile.TemporaryDirectory() as folder:
        small = reduced(config, world, Path(folder), gpu=gpu)
        run = Run.start(small)
        try:
            began = time.perf_counter()
            with Metrics(small, run.first) as metrics, log.Progress(1, first=False) as progress:
                train_step(run, 0, metrics, progress)
            return time.perf_counter() - began
        finally:
            run.finish(0.0)
            log.setup(run.first)  # the folder of run.log goes
