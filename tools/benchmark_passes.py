"""What a single pass of the transformer costs, in the state in which a KVPO update runs it.

    python -m tools.benchmark_passes examples/wan/benchmark_longlive_1.3b.yaml --rows 1,8,9 \
        --backward 1,2 --output passes.json
    torchrun --nproc_per_node 2 -m tools.benchmark_passes RECIPE parallel.tensor=2 --output two.json

A pass is one block against the rest of the window in the cache, without a memory bank; adapters act
beside the weights. On a GPU a floor stands beside it: what its attention and its matrix products
take alone. All ranks run the same passes, the first one writes the JSON and a Markdown table.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo import log, settings
from megatron_kvpo.config import RunConfig, load_config
from megatron_kvpo.model.causal_wan import TextKeys
from megatron_kvpo.model.flops import pass_flops
from megatron_kvpo.model.lora import SLOTS, adapters_of
from megatron_kvpo.model.pages import PassPages
from megatron_kvpo.model.specs import check_layout
from megatron_kvpo.model.wan_vae import find_wan_vae
from megatron_kvpo.model.weights import local_part, whole_shape
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.parallel.seeds import device_generator, noise
from megatron_kvpo.parallel.transfer import indices
from megatron_kvpo.rollout.sampler import block_noise, extend
from megatron_kvpo.rollout.stream import Stream, new_world
from megatron_kvpo.training.policy import Policy
from tools import benchmark_report, provenance
from tools.benchmark import matmul_ceiling
from tools.benchmark_decoding import decoding
from tools.benchmark_kernels import (
    Call,
    call_times,
    floor,
    host_time,
    median,
    profile,
)
from tools.generate_output import decoding_device

logger = log.get_logger("megatron_kvpo.tools.benchmark_passes")

_MODULE = "tools.benchmark_passes"

NO_SLOT = "none"
"""The name of the bare base beside those of the slots."""

TIMESTEP = 500.0

UP_SIZE = 0.01
"""Standard deviation of the adapters' B, where the recipe names no adapter."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write. ValueError for options or a recipe that cannot run so."""
    options = _parse(arguments)
    _check_options(options)
    config = load_config(options.recipe, options.overrides)
    check_layout(config.model, config.parallel, config.stream.block_frames)
    if config.policy.mode != "lora":
        raise ValueError(
            f"policy.mode is {config.policy.mode}: passes are measured with adapters, set "
            "policy.mode to lora"
        )
    if options.decode_on is not None and (config.codec.vae is None or not options.video):
        raise ValueError("--decode-on is where --video decodes: give that and codec.vae")
    if options.video and config.codec.vae is not None:
        find_wan_vae(config.codec.vae)
    ranks = start_ranks(config.parallel, config.device)
    try:
        log.setup(is_first(ranks))
        if options.decode_on is not None:
            decoding_device(options.decode_on, ranks)
        found = measure(config, ranks, options)
        if is_first(ranks):
            write(found, options.output)
    finally:
        stop_ranks()
    return 0


def measure(config: RunConfig, ranks: Ranks, options: argparse.Namespace) -> dict[str, Any]:
    """Every pass that is asked for, one after the other. Collective."""
    policy = Policy.build(config, ranks, on_device=True)
    if config.policy.adapter is None:
        stir(policy)
    bench = Bench(
        config=config, ranks=ranks, policy=policy, warmup=options.warmup, repeats=options.repeats,
        ceiling=matmul_ceiling(ranks.device, config.model.torch_dtype),
        decode_on=options.decode_on,
    )  # fmt: skip
    slot = None if options.slot == NO_SLOT else options.slot
    passes = []
    for number, rows in enumerate(options.rows, start=1):
        last = options.profile and number == len(options.rows)
        table = options.output.with_suffix(".txt") if last else None
        found = bench.measure(rows, slot, graph=False, table=table)
        if ranks.device.type == "cuda":
            alone = floor(config, ranks, rows, adapters=slot is not None, warmup=options.warmup,
                          repeats=options.repeats)  # fmt: skip
            found["floor"] = {**alone, "share": alone["floor_ms"] / found["median_ms"]}
        passes.append(found)
    passes += [bench.measure(rows, "current", graph=True) for rows in options.backward]
    if options.video:
        passes.append(bench.video(slot))
    return {
        "name": options.output.stem,
        **provenance.made_by(_MODULE, ranks.world),
        "matmul_ceiling_tflops": bench.ceiling,
        "passes": passes,
        "config": settings.to_mapping(config),
    }


@torch.no_grad()
def stir(policy: Policy) -> None:
    """Move all slots off the base: their B leave zero, alike in every slot."""
    axis = policy.model.spec.ranks.tensor
    for name, adapter in adapters_of(policy.model).items():
        up = adapter.lora_B["current"]
        rng = device_generator(up.device, _MODULE, name)
        shape = whole_shape(up, axis)
        drawn = UP_SIZE * torch.randn(shape, generator=rng, device=up.device)
        for held in adapter.lora_B.values():
            held.copy_(local_part(drawn, up, axis))


class Scene:
    """Rows that stand before a block, and what the model is called with there."""

    def __init__(self, policy: Policy, config: RunConfig, rows: int) -> None:
        """Under the weights that act; with gradients enabled, as a replay that goes backward."""
        model, stream = policy.model, config.stream
        device, sizes = model.spec.ranks.device, config.model
        cached = stream.window_frames - stream.block_frames
        self._model, self._optimizer = model, policy.optimizer
        shape = (rows, stream.block_frames, *sizes.frame_shape)
        self._latent_BFCHW = noise(shape, _MODULE, "latent", device=device)
        self._time_B1 = torch.full((rows, 1), TIMESTEP, device=device)
        self._frames = range(cached, stream.window_frames)
        text_BXD = noise((1, sizes.text_length, sizes.text_dim), _MODULE, "text", device=device)
        text = model.encode_text(text_BXD).select(indices([0] * rows, device))
        self._text = TextKeys(tuple((_leaf(k), _leaf(v)) for k, v in text.layers))
        read = pages_read(rows, stream.sink_frames, cached)
        pool = model.new_pool(read[-1][-1] + 1)
        for held in (pool.key, pool.value):
            held.normal_(generator=device_generator(device, _MODULE, "pages"))
        self._pages = PassPages(pool, indices(read, device))

    def forward(self) -> Tensor:
        """Velocity [B, F, C, H, W] of the block."""
        velocity: Tensor = self._model(
            self._latent_BFCHW, self._time_B1, self._frames, self._text, self._pages
        )
        return velocity

    def forward_backward(self) -> None:
        """The same, and the gradients of the trained adapters and of the texts."""
        self.forward().square().mean().backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Zero all gradients."""
        self._optimizer.zero_grad()
        for tensor in (t for pair in self._text.layers for t in pair):
            tensor.grad = None


def pages_read(rows: int, sink: int, cached: int) -> list[list[int]]:
    """Pages of each row's cached frames: the sink's are shared, the later ones each row's own.

    So the branches of a group stand from the third block after the fork on.
    """
    own = cached - sink
    return [[*range(sink), *(sink + row * own + i for i in range(own))] for row in range(rows)]


def _leaf(tensor: Tensor) -> Tensor:
    """Texts are encoded once for many passes: what these send back stops at the keys."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """A policy on these ranks, and how its passes are timed."""

    config: RunConfig
    ranks: Ranks
    policy: Policy
    warmup: int
    repeats: int
    ceiling: float
    """TFLOP/s of a large matrix product."""

    decode_on: str | None = None
    """Another device, where a video's blocks are decoded while the next ones are made."""

    def measure(
        self, rows: int, slot: str | None, *, graph: bool, table: Path | None = None
    ) -> dict[str, Any]:
        """The record of one pass; with `graph` its backward too. `table`: profile it there."""
        device = self.ranks.device
        with self._acting(slot), torch.set_grad_enabled(graph):
            scene = Scene(self.policy, self.config, rows)
            call: Call = scene.forward_backward if graph else scene.forward
            before: Call | None = scene.forget if graph else None
            held = _memory(device, "held_memory_gib", torch.cuda.memory_allocated)
            call_times(call, device, self.warmup, before)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            times = call_times(call, device, self.repeats, before)
            peak = _memory(device, "peak_memory_gib", torch.cuda.max_memory_allocated)
            host = host_time(call, device, before)
            if table is not None:
                profile(call, device, table if is_first(self.ranks) else None)
        kind = "forward_backward" if graph else "forward"
        flops = self.flops(rows, slot, graph=graph)
        found = {"kind": kind, "slot": slot or NO_SLOT, "rows": rows,
                 **_summary(times, host, rows, flops, self.ceiling), **held, **peak}  # fmt: skip
        logger.info("%s of %d rows: %.4g ms", kind, rows, found["median_ms"])
        return found

    def video(self, slot: str | None) -> dict[str, Any]:
        """One video alone, block after block: denoising steps and the pass that fills the cache.

        With codec.vae named, the decoding of a block's latents too.
        """
        world = new_world(self.policy.model, dataclasses.replace(
            self.config.stream, resident_frames=self.config.stream.window_frames,
        ), self.config.routing, 1, self.config.memory)  # fmt: skip
        device, sizes = self.ranks.device, self.config.model
        draw = block_noise(sizes, world.stream, (0, 0), device)
        text_BXD = noise((1, sizes.text_length, sizes.text_dim), _MODULE, "text", device=device)
        with self._acting(slot), torch.no_grad():
            stream = Stream.begin(world, 1, self.policy.model.encode_text(text_BXD))
            blocks: Call = lambda: extend(stream, draw, (0, 0))  # noqa: E731
            call_times(blocks, device, world.stream.window_frames // world.stream.block_frames + 3)
            times = call_times(blocks, device, self.repeats)
            host = host_time(blocks, device)
        forwards = len(world.stream.steps) + 1
        found = {"kind": "video_block", "slot": slot or NO_SLOT, "rows": 1,
                 **_summary(times, host, 1, forwards * self.flops(1, slot, graph=False),
                            self.ceiling),
                 **_memory(device, "peak_memory_gib", torch.cuda.max_memory_allocated)}  # fmt: skip
        if self.config.codec.vae is not None:
            following = lambda: extend(stream, draw, (0, 0)).clean  # noqa: E731
            with self._acting(slot), torch.no_grad():
                found |= decoding(self.config, self.ranks, self.decode_on, found["median_ms"],
                                  following, self.warmup, self.repeats)  # fmt: skip
        logger.info("a block of %d forwards of one video: %.4g ms", forwards, found["median_ms"])
        return found

    def flops(self, rows: int, slot: str | None, *, graph: bool) -> float:
        """Operations of a pass on this rank."""
        stream, tokens = self.config.stream, self.config.model.tokens_per_frame
        policy = self.config.policy
        rank = policy.lora_rank if slot and (graph or not policy.merge) else 0
        one = pass_flops(self.config.model, stream.block_frames * tokens,
                         stream.window_frames * tokens, rank, graph=graph)  # fmt: skip
        return rows * one / (self.ranks.tensor.size * self.ranks.context.size)

    def _acting(self, slot: str | None) -> AbstractContextManager[object]:
        return self.policy.bank.use(None) if slot is None else self.policy.acting(slot)


def _summary(
    times: Sequence[float], host: float, rows: int, flops: float, ceiling: float
) -> dict[str, Any]:
    middle = median(times)
    rate = flops / middle / 1e9
    return {
        "repeats": len(times), "min_ms": min(times), "median_ms": middle, "max_ms": max(times),
        "ms_per_row": middle / rows, "host_ms": host, "tflop": flops / 1e12, "tflops": rate,
        "share": rate / ceiling,
    }  # fmt: skip


def _memory(device: torch.device, name: str, read: Callable[..., int]) -> dict[str, float]:
    return {name: read(device) / 2**30} if device.type == "cuda" else {}


def write(found: dict[str, Any], path: Path) -> None:
    """Write the record, and its table (.md) beside it."""
    provenance.write_json(found, path)
    path.with_suffix(".md").write_text(table(found))


def table(found: dict[str, Any]) -> str:
    """One line a pass; below, one a floor if there are any."""
    lines = [
        f"{benchmark_report.head(found)}A large matrix product reaches "
        f"{found['matmul_ceiling_tflops']:.3g} TFLOP/s here.\n",
        "| pass | slot | rows | ms: median (min to max) | ms a row | host ms | TFLOP | TFLOP/s "
        "| of the ceiling | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in found["passes"]:
        peak = f"{p['peak_memory_gib']:.1f}" if "peak_memory_gib" in p else ""
        lines.append(
            f"| {p['kind']} | {p['slot']} | {p['rows']} | {p['median_ms']:.4g} ({p['min_ms']:.4g} "
            f"to {p['max_ms']:.4g}) | {p['ms_per_row']:.4g} | {p['host_ms']:.4g} "
            f"| {p['tflop']:.4g} | {p['tflops']:.3g} | {p['share']:.0%} | {peak} |"
        )
    for p in found["passes"]:
        if "decode_ms" in p:
            lines.append(
                f"\nDecoding that block: {p['decode_ms']:.4g} ms, "
                f"{'on ' + p['decode_on'] + ' beside the next, ' if 'decode_on' in p else ''}"
                f"together {p['with_decode_ms']:.4g} ms."
            )
    return "\n".join([*lines, *_floors(found["passes"])]) + "\n"


def _floors(passes: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "\nThe same attention and matrix products alone; adapters, which can be merged, apart:\n",
        "| rows | attention ms | text ms | linear ms | floor ms | a row | of the forward "
        "| adapters ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    floors = [(p["rows"], p["floor"]) for p in passes if "floor" in p]
    for rows, f in floors:
        adapters = f"{f['adapters_ms']:.4g}" if "adapters_ms" in f else ""
        lines.append(
            f"| {rows} | {f['attention_ms']:.4g} | {f['text_ms']:.4g} | {f['linear_ms']:.4g} "
            f"| {f['floor_ms']:.4g} | {f['floor_ms_per_row']:.4g} | {f['share']:.0%} "
            f"| {adapters} |"
        )
    return lines if floors else []


def _check_options(options: argparse.Namespace) -> None:
    if options.output.suffix != ".json":
        raise ValueError(f"--output {options.output} must end in .json")
    for name, numbers in (("rows", options.rows), ("backward", options.backward)):
        if any(rows < 1 for rows in numbers):
            raise ValueError(f"--{name} {numbers}: a pass has at least 1 row")
    if not options.rows and (options.profile or not (options.backward or options.video)):
        raise ValueError("--rows is empty, no forward pass is asked for: name one, --rows 1,8")
    if options.slot not in (*SLOTS, NO_SLOT):
        raise ValueError(f"--slot {options.slot} is no slot: use one of {(*SLOTS, NO_SLOT)}")
    if min(options.repeats, options.warmup) < 1:
        raise ValueError(
            f"--repeats {options.repeats} and --warmup {options.warmup} must be at least 1: the "
            "first pass compiles kernels"
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="a .json file")
    parser.add_argument("--rows", type=_numbers, default=[1], help="of forward passes: 1,8,9")
    parser.add_argument("--backward", type=_numbers, default=[], help="rows, with backward: 1,2")
    parser.add_argument("--slot", default="old", help="that acts in forward passes, or none")
    parser.add_argument("--repeats", type=int, default=10, help="that count")
    parser.add_argument("--warmup", type=int, default=3, help="that do not")
    parser.add_argument("--video", action="store_true", help="one video alone, block by block")
    parser.add_argument("--decode-on", metavar="DEVICE", help="--video's VAE beside it: cuda:1")
    parser.add_argument("--profile", action="store_true", help="kernels of the last forward, .txt")
    return parser.parse_intermixed_args(arguments)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


if __name__ == "__main__":
    log.run_command(main, logger)
