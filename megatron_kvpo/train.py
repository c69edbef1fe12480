"""Align a streaming video generator with KVPO. The whole run, in order.

One process:
    python -m megatron_kvpo.train examples/shapes/demo.yaml [section.key=value ...]
Two ranks:
    torchrun --nproc_per_node 2 -m megatron_kvpo.train examples/shapes/demo.yaml
"""

from __future__ import annotations

import sys

from megatron_kvpo import log
from megatron_kvpo.algorithm.loss import energy_weights
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.training.alarms import check_gradients
from megatron_kvpo.training.group_dump import Figures
from megatron_kvpo.training.metrics import Metrics
from megatron_kvpo.training.run import Run


def train(config: RunConfig) -> None:
    """Run until config.num_updates updates are done, from a checkpoint if there is one."""
    run = Run.start(config)  # ranks, model, policies, prompts, rewards; resumed if it can be
    with run.watched(), Metrics(config, run.first, resume_at=run.update) as metrics:
        run.evaluate("before", metrics)
        with log.Progress(config.num_updates, first=run.first, start=run.update) as progress:
            update = run.update
            while not run.ends(update):
                train_step(run, update, metrics, progress)
                update += 1
        if not run.interrupted:
            run.evaluate("after", metrics)
    run.finish(progress.seconds_per_update)


def train_step(run: Run, update: int, metrics: Metrics, progress: log.Progress) -> None:
    """One update over config.policy.groups_per_update prompts."""
    config, policy, stages = run.config, run.policy, run.stages

    # Explore: one shared prefix a prompt, then G routed branches and the anchor.
    policy.sync_old(update)
    # Judges elsewhere score the videos from here on.
    groups = stages.explore(update, send=True)

    # Replay: how likely does each policy, unrouted, find these branches?
    current, old, reference = run.energies(update, groups)
    if update == run.update:
        run.check_start(update, groups, (current, old, reference))

    # Reward: what are they worth, beside the anchor?
    rewards = stages.score(groups)
    advantage_PG, scale_P, seen = stages.advantages(update, groups, rewards)
    figures = Figures(energies=(current, old, reference), tables=rewards,
                      advantage_PG=advantage_PG, scale_P=scale_P)  # fmt: skip
    run.examine(update, groups, figures)
    run.show(update, metrics, groups, figures)

    # Update: the loss sees G numbers a group, so each branch goes backward by itself.
    loss, weight_PG = energy_weights(
        current.branch_PG, old.branch_PG, reference and reference.branch_PG, advantage_PG, scale_P,
        config.energy.temperature, config.loss,
    )  # fmt: skip
    policy.optimizer.zero_grad()
    seen["policy/drift"] = stages.backward(update, groups, weight_PG, reference)
    policy.optimizer.finalize()
    if update == run.update:
        check_gradients(config.alarms, stages)
    grad_norm = policy.step(update)

    run.log(update, metrics, progress, groups, loss, seen, current, grad_norm)
    run.evaluate_on_the_way(update + 1, metrics)
    run.save(update + 1)


if __name__ == "__main__":
    log.run_training(
        lambda recipe, changes: train(load_config(recipe, changes)), sys.argv[1:],
        smaller="policy.rollout_rows, policy.max_rows, model.recompute=true",
    )  # fmt: skip
