"""What a step of pre-training costs at full size, on random weights and random latents.

    python -m tools.benchmark_pretrain examples/wan/pretrain_1.3b.yaml --output step.json
    torchrun --nproc_per_node 4 -m tools.benchmark_pretrain RECIPE section.key=value --output X.json

A model's own operations are counted from shapes, over exactly the keys that are seen, and nothing
that is computed again; MFU is their rate over the GPU's dense bfloat16 peak. All ranks take the
same steps, the first one writes the JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_kvpo import log, settings
from megatron_kvpo.model.flops import forward_flops, peak_of, training_flops
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import device_generator
from megatron_kvpo.records import LatentBatch
from megatron_kvpo.stopwatch import Stopwatch
from megatron_kvpo.training.learner import Learner
from megatron_kvpo.training.pretrain import check_recipe, empty_text
from megatron_kvpo.training.pretrain_config import PretrainConfig
from tools import benchmark_report, provenance
from tools.benchmark import matmul_ceiling, traced

logger = log.get_logger("megatron_kvpo.tools.benchmark_pretrain")

_MODULE = "tools.benchmark_pretrain"


class RandomLatents:
    """A LatentStream of normal latents and texts, one segment a clip: what a step costs on any."""

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        """This data rank's share of the recipe's global batch."""
        self._config, self._ranks = config, ranks

    def batches(self, step: int = 0) -> Iterator[LatentBatch]:
        """See LatentStream.batches."""
        share = self._config.fitting.batch_size // self._ranks.data.size
        first = self._ranks.data.rank * share
        for number in itertools.count(step):
            yield self._batch(number, range(first, first + share))

    def _batch(self, step: int, rows: range) -> LatentBatch:
        model, device = self._config.model, self._ranks.device
        frames = self._config.stream.num_frames
        latents, texts = [], []
        for row in rows:
            rng = device_generator(device, _MODULE, self._config.seed, step, row)
            shape = frames, *model.frame_shape
            latents.append(torch.randn(shape, generator=rng, device=device))
            shape = model.text_length, model.text_dim
            texts.append(torch.randn(shape, generator=rng, device=device))
        return LatentBatch(
            latent_BFCHW=torch.stack(latents), text_SXD=torch.stack(texts),
            segment_S3=torch.tensor([(i, 0, frames) for i in range(len(rows))], device=device),
            index_B=torch.tensor(rows, device=device),
        )  # fmt: skip

    def fingerprint(self) -> str:
        """See LatentStream.fingerprint."""
        return f"random latents of seed {self._config.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. ValueError for options or a recipe that cannot run so."""
    options = _parse(arguments)
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} must end in .json")
    if options.steps < 1 or options.warmup < 0:
        raise ValueError(f"--steps {options.steps} must be above 0, --warmup {options.warmup} not "
                         "below 0")  # fmt: skip
    config = benchmarked(settings.load(PretrainConfig, options.recipe, options.overrides))
    ranks = start_ranks(config.parallel, config.device)
    try:
        check_recipe(config, ranks)
        log.setup(is_first(ranks))
        measure(config, ranks, options)
    finally:
        stop_ranks()
    return 0


def benchmarked(config: PretrainConfig) -> PretrainConfig:
    """The recipe without files: random weights, and captions that need no other of the batch."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, weights=None),
        trained=dataclasses.replace(config.trained, adapter=None),
        fitting=dataclasses.replace(config.fitting, caption_noise=0.0),
        latents=dataclasses.replace(config.latents, empty_text=None),
    )  # fmt: skip


def measure(config: PretrainConfig, ranks: Ranks, options: argparse.Namespace) -> None:
    """The steps, one after the other, and what they come to, written by the first rank. Collective.

    What is profiled comes after: a trace may take minutes to write.
    """
    learner = Learner.build(config, ranks, empty_text(config), on_device=True)
    ceiling = matmul_ceiling(ranks.device, config.model.torch_dtype)
    batches, watches = RandomLatents(config, ranks).batches(), list[Stopwatch]()
    own = config.fitting.own_estimates_from < 1 if options.own is None else options.own
    cuda = ranks.device.type == "cuda"
    for step in range(options.warmup + options.steps):
        if cuda and step == options.warmup:
            torch.cuda.reset_peak_memory_stats(ranks.device)
        batch = next(batches)
        with Stopwatch() as watch:
            learner.train_step(batch, step, own=own, scale=1.0)
        logger.info("step %d: %.4g s", step + 1, watch.seconds)
        watches.append(watch)
    seconds = sorted(watch.seconds for watch in watches[options.warmup :])
    middle = seconds[len(seconds) // 2]
    work = work_of(config, ranks, learner, own=own)
    rate = work["tflop"] / middle
    found = {
        "name": options.output.stem, **provenance.made_by(_MODULE, ranks.world),
        "matmul_ceiling_tflops": ceiling, "own_estimates": own, "warmup": options.warmup,
        "steps": len(seconds), "min_s": seconds[0], "median_s": middle, "max_s": seconds[-1],
        "stages_s": _stages(watches[options.warmup :]), **work,
        "tokens_per_s": work["tokens"] / middle, "clips_per_s": work["clips"] / middle,
        "tflops": rate, "share": rate / ceiling, "config": settings.to_mapping(config),
    }  # fmt: skip
    peak = options.peak or peak_of(str(found["machine"]["device"]))
    if peak:
        found |= {"peak_tflops": peak, "mfu": rate / peak}
    if cuda:
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(ranks.device) / 2**30
        found["reserved_memory_gib"] = torch.cuda.max_memory_reserved(ranks.device) / 2**30
    if is_first(ranks):
        provenance.write_json(found, options.output)
        options.output.with_suffix(".md").write_text(table(found))
    if options.profile:
        with traced(options.output.with_suffix(f".trace{ranks.rank}.json")):
            learner.train_step(next(batches), len(watches), own=own, scale=1.0)


def work_of(
    config: PretrainConfig, ranks: Ranks, learner: Learner, *, own: bool
) -> dict[str, float]:  # fmt: skip
    """A step's clips and tokens over all ranks, and the model's TFLOP on this one."""
    sight, rows = learner.forcing.sight, config.fitting.batch_size
    rank = config.trained.lora_rank if config.trained.mode == "lora" else 0
    tokens, pairs = sight.num_tokens, sight.num_pairs
    one = training_flops(config.model, tokens, pairs, rank)
    if own:
        parts = forward_flops(config.model, tokens, pairs / tokens, rank)
        one += sum(parts.values())
    share = ranks.data.size * ranks.tensor.size * ranks.context.size
    return {
        "clips": rows, "tokens": rows * tokens, "seen_keys": pairs / tokens,
        "tflop": rows * one / share / 1e12,
    }  # fmt: skip


def _stages(watches: Sequence[Stopwatch]) -> dict[str, float]:
    """Median seconds of each."""
    return {
        name: sorted(watch.stages[name].seconds for watch in watches)[len(watches) // 2]
        for name in watches[0].stages
    }


def table(found: dict[str, Any]) -> str:
    """One line, and the stages below."""
    mfu = f"{found['mfu']:.1%}" if "mfu" in found else ""
    peak = f"{found['peak_memory_gib']:.1f}" if "peak_memory_gib" in found else ""
    config = found["config"]
    lines = [
        f"{benchmark_report.head(found)}A large matrix product reaches "
        f"{found['matmul_ceiling_tflops']:.3g} TFLOP/s here.\n",
        "| trained | forcing | frames | clips | s: median (min to max) | tokens/s | TFLOP a rank "
        "| TFLOP/s | MFU | of the ceiling | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| {config['trained']['mode']} | {config['fitting']['forcing']} "
        f"| {config['stream']['num_frames']} | {found['clips']} "
        f"| {found['median_s']:.4g} ({found['min_s']:.4g} to {found['max_s']:.4g}) "
        f"| {found['tokens_per_s']:.4g} | {found['tflop']:.4g} | {found['tflops']:.3g} | {mfu} "
        f"| {found['share']:.1%} | {peak} |",
        "",
        "Seconds: " + ", ".join(f"{n} {s:.4g}" for n, s in found["stages_s"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--steps", type=int, default=5, help="that count")
    parser.add_argument("--warmup", type=int, default=3, help="that do not: they compile kernels")
    parser.add_argument("--own", action=argparse.BooleanOptionalAction,
                        help="with own estimates; by default as the recipe ends")  # fmt: skip
    parser.add_argument("--peak", type=float, help="TFLOP/s of the GPU, if it is not in the table")
    parser.add_argument("--profile", action="store_true", help="trace one more step")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    log.run_command(main, logger)
