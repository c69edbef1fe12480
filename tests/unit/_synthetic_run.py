"""A made-up run folder with everything a finished run leaves, for the report and the evidence."""

import json
from pathlib import Path

import numpy as np

from megatron_kvpo import settings
from megatron_kvpo.config import RunConfig
from megatron_kvpo.training.filmstrips import Filmstrips
from megatron_kvpo.training.summary import EvaluationTable, summarise, to_json

CAPTIONS = (
    "a red square moves right; then it turns blue and falls",
    "a green circle bounces; then it slows down",
    "a yellow triangle moves up and a purple square moves left; then both turn white; "
    "then the triangle falls",
)


def moving_square(rng, frames=45, side=32):
    """uint8 [F, H, W, 3]: a coloured square crossing a dark ground."""
    video = np.full((frames, side, side, 3), 24, dtype=np.uint8)
    colour = rng.integers(60, 256, size=3)
    start = rng.uniform(0, side - 9, size=2)
    speed = rng.uniform(-0.4, 0.4, size=2)
    for f in range(frames):
        y, x = np.clip(start + speed * f, 0, side - 8).astype(int)
        video[f, y : y + 8, x : x + 8] = colour
    return video


def tables(rng, gain, prompts=32, noises=8, held_out_gain=0.05):
    """Before and after with a composite gain of about `gain` base SD."""
    effect = rng.normal(0, 0.5, size=(prompts, 1))
    base = {
        n: 0.6 + 0.1 * (effect + rng.normal(size=(prompts, noises))) for n in ("vq", "mq", "ta")
    }
    base["consistency"] = 0.8 + 0.05 * rng.normal(size=(prompts, noises))
    shift = {"vq": 0.15, "mq": 0.02, "ta": 0.08, "consistency": held_out_gain}
    noise = 0.05 if gain else 0.0
    after = {
        n: v + gain * shift[n] + noise * gain * rng.normal(size=v.shape) for n, v in base.items()
    }
    weights = {"vq": 1.0, "mq": 1.0, "ta": 1.0}
    return EvaluationTable.build(base, weights), EvaluationTable.build(after, weights)


def write_run(folder: Path, config: RunConfig, gain=0.6, updates=40, base_seed=0, **tables_more):
    """Fill `folder` as a finished run would."""
    rng = np.random.default_rng(base_seed)
    folder.mkdir(parents=True, exist_ok=True)
    settings.dump(config, folder / "config.yaml")
    before, after = tables(rng, gain, **tables_more)
    before.save(folder / "evaluation_before.npz")
    after.save(folder / "evaluation_after.npz")
    summary = summarise(
        before, after, held_out=("consistency",), updates=updates, seconds_per_update=7.25, ranks=2
    )
    (folder / "summary.json").write_text(to_json(summary) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for update in range(updates):
            rise = gain * (1 - np.exp(-update / 15))
            names = ("composite", "vq", "mq", "ta", "consistency")
            line = {"update": update}
            line |= {f"reward/{n}": 0.6 + 0.1 * rise + 0.03 * rng.normal() for n in names}
            line["reward/composite_se"] = 0.03
            line |= {"loss/total": 0.01 * rng.normal(), "loss/kl": 1e-5 * np.exp(update / 8)}
            line |= {"policy/ratio_max": 1 + 0.001 * update, "policy/ratio_min": 1 - 0.001 * update}
            line |= {
                "policy/entropy": 2.079 - 0.0001 * update,
                "policy/grad_norm": rng.uniform(1, 2),
            }
            line |= {"policy/ratio_mean": 1.0, "time/update_s": 7.25}
            file.write(json.dumps(line) + "\n")
    strips = folder / "filmstrips"
    for name in ("before", "after", "real"):
        frames = np.stack([moving_square(rng) for _ in CAPTIONS])
        Filmstrips(frames_RFHWC=frames, labels=CAPTIONS).save(strips / f"{name}.npz")
    labels = ["anchor", *(f"branch {g}: {3 + g}, {6 + g}, {8 + g}, {11 + g}" for g in range(8))]
    frames = np.stack([moving_square(rng) for _ in labels])
    Filmstrips(frames_RFHWC=frames, labels=tuple(labels), window=(21, 33),
               caption=CAPTIONS[0]).save(strips / "branches.npz")  # fmt: skip
