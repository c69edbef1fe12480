"""Replays a file of golden vectors with our model: the largest relative error of each run.

    python -m tools.golden tests/golden/memflow_tiny.safetensors
    torchrun --nproc_per_node 2 -m tools.golden FILE --tensor 2 --sequence-parallel
    python -m tools.golden FILE --device cuda --dtype bfloat16

Such a file (safetensors) holds tiny random weights and what the public model, LongLive or MemFlow,
made of them in float32 on a CPU; its metadata `config` (JSON) gives the sizes. An error is
max|ours - theirs| / max|theirs| of one tensor. Exit code 0 if every error is within the tolerance,
1 if one is above it, 2 if the file or the layout cannot work.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.config import (
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RoutingConfig,
    StreamConfig,
)
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import load_weights
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks
from megatron_kvpo.rollout.sampler import denoise_block
from megatron_kvpo.rollout.stream import Stream, World, new_world

logger = log.get_logger("megatron_kvpo.tools.golden")

Dtype = Literal["float32", "bfloat16"]
"""Of weights, activations and pages, as `model.dtype`."""

TOLERANCES: Mapping[str, float] = MappingProxyType({"float32": 2e-5, "bfloat16": 3e-2})
"""float32: mistakes in a re-cache show up at 1e-4, rounding stays below 1e-5. The files are float32
runs, so bfloat16 is off by its own rounding, 1.1e-2: that shows the gross mistakes only."""

NAMES = re.compile(
    r"weights\..+|text\.\d+|route\.plans|route\.b\d+\.(z0|eps)|(route|replay)\.g\d+\.b\d+\.\w+"
    r"|(stream|switch|late_switch)\.b\d+\.(eps|bank_k_norms|x0|[zv]\d+)"
)
"""Every tensor that a golden file may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenFile:
    """What a file of golden vectors holds."""

    path: Path
    sizes: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @staticmethod
    def read(path: Path) -> GoldenFile:
        """Read a file. ValueError, saying what is missing, if it is not of the format."""
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("config")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        if text is None:
            raise ValueError(f"{path} is not a golden file: its metadata has no `config`")
        try:
            sizes = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the metadata `config` of {path} is not JSON: {error}") from error
        if not isinstance(sizes, dict):
            raise ValueError(f"the metadata `config` of {path} is no mapping of sizes: {text}")
        golden = GoldenFile(path=path, sizes=sizes, tensors=tensors)
        golden._check()
        return golden

    def _check(self) -> None:
        strange = [name for name in self.tensors if not NAMES.fullmatch(name)]
        if strange:
            raise ValueError(
                f"{self.path} is not a golden file: {len(strange)} of its {len(self.tensors)} "
                f"tensors have names that no run has, {strange[0]} among them"
            )
        for name in ("text.0", "stream.b0.z0"):
            self.tensor(name)

    def size(self, name: str) -> Any:
        """An entry of the metadata. ValueError if it is missing."""
        if name not in self.sizes:
            raise ValueError(
                f"the metadata `config` of {self.path} has no {name}: it has {sorted(self.sizes)}"
            )
        return self.sizes[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor. ValueError if it is missing."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} is not a golden file: it has no tensor {name}")
        return self.tensors[name]

    def count(self, start: str, end: str) -> int:
        """Tensors whose name is `start`, a number and `end`."""
        pattern = re.compile(rf"{re.escape(start)}\d+{re.escape(end)}")
        return sum(pattern.fullmatch(name) is not None for name in self.tensors)

    @property
    def results(self) -> set[str]:
        """Names of what the public model computed."""
        inputs = re.compile(r"weights\..+|text\.\d+|route\.plans|route\.b\d+\.z0|.*\.eps")
        return {name for name in self.tensors if not inputs.fullmatch(name)}

    def switch_frame(self, run: str) -> int | None:
        """Where a run switches to text 1: a file without a run `switch` switches in `stream`."""
        if run != "stream":
            return int(self.size(f"{run}_frame"))
        return None if "switch.b0.z0" in self.tensors else self.sizes.get("switch_frame")


def build_world(
    golden: GoldenFile, parallel: ParallelConfig, ranks: Ranks, dtype: Dtype = "float32"
) -> World:
    """The file's model on these ranks, streaming as the file says. ValueError if it cannot."""
    size, start = golden.size, golden.tensor("stream.b0.z0")
    config = ModelConfig(
        hidden_dim=size("dim"), ffn_dim=size("ffn_dim"), num_layers=size("num_layers"),
        num_heads=size("num_heads"), text_dim=size("text_dim"), text_length=size("text_len"),
        latent_channels=start.shape[0], latent_height=size("latent_h"),
        latent_width=size("latent_w"), dtype=dtype,
    )  # fmt: skip
    stream = StreamConfig(
        window_frames=size("window_frames"), sink_frames=size("sink_frames"),
        resident_frames=size("cache_frames"), block_frames=start.shape[1],
        steps=tuple(size("sigmas")), shift=1.0,  # a shift of 1 takes the levels as they are
    )  # fmt: skip
    routing, memory, rows = RoutingConfig(), MemoryConfig(), 2
    if "bank_frames" in golden.sizes:
        memory = MemoryConfig(
            bank_frames=size("bank_frames"), stage_blocks=size("record_interval_blocks"),
            sparse=size("sparse_memory"),
            reference_quirks=golden.sizes.get("reference_quirks", True),
        )  # fmt: skip
    if "route.plans" in golden.tensors:
        routing = RoutingConfig(num_recent_frames=size("nearest_frames") - stream.block_frames)
        rows += 1 + len(golden.tensor("route.plans"))
    model = CausalWan(config, Spec.build(config, parallel, ranks, None))
    weights = {
        n.removeprefix("weights."): t for n, t in golden.tensors.items() if n[:8] == "weights."
    }
    load_weights(model, weights, str(golden.path))
    return new_world(model, stream, routing, rows, memory)


@dataclass(slots=True)
class Largest:
    """The largest error of one run, the tensor that has it, and how many were compared."""

    error: float = 0.0
    name: str = ""
    count: int = 0

    def see(self, error: float, name: str) -> None:
        """Take one tensor's error in; nan counts as infinite."""
        error = error if math.isfinite(error) else math.inf
        self.count += 1
        if error >= self.error:
            self.error, self.name = error, name


@dataclass(slots=True)
class Comparison:
    """Our model beside a golden file: every run it has, and how far off each is."""

    golden: GoldenFile
    world: World
    runs: dict[str, Largest] = field(default_factory=dict)
    compared: set[str] = field(default_factory=set)

    @property
    def errors(self) -> dict[str, float]:
        """Largest relative error of each run."""
        return {run: largest.error for run, largest in self.runs.items()}

    @torch.no_grad()
    def run_all(self) -> None:
        """Every run that the file has. ValueError if that leaves a recorded number out."""
        for run in ("stream", "switch", "late_switch"):
            if f"{run}.b0.z0" in self.golden.tensors:
                self.run_stream(run)
        if "route.plans" in self.golden.tensors:
            self.run_route_and_replay()
        left = sorted(self.golden.results - self.compared)
        if left:
            raise ValueError(f"{len(left)} recorded tensors belong to no run, {left[0]} among them")

    def run_stream(self, run: str) -> None:
        """One video, block after block; with a bank, what it holds after each."""
        golden, blocks = self.golden, list[Tensor]()
        stream, switch = Stream.begin(self.world, 1, self._text(0)), golden.switch_frame(run)
        for block in range(golden.count(f"{run}.b", ".z0")):
            if stream.frame == switch:
                stream.recache(self._text(1), torch.cat(blocks, dim=1))
            name = f"{run}.b{block}"
            blocks.append(self._block(stream, run, [name], name))
            if f"{name}.bank_k_norms" in golden.tensors:
                norms = golden.tensor(f"{name}.bank_k_norms")
                self._compare("bank", f"{name}.bank_k_norms", _bank_norms(stream), norms)
        stream.release()

    def run_route_and_replay(self) -> None:
        """Routed blocks after the `stream` prefix, anchor and branches in one batch; their replay.

        The replay is fed the recorded states in the plain context and commits recorded latents.
        """
        golden, frames = self.golden, self.world.stream.block_frames
        prefix = Stream.begin(self.world, 1, self._text(0))
        for block in range(golden.size("fork_frame") // frames):
            self._block(prefix, "stream", [f"stream.b{block}"], f"stream.b{block}")
        routes = [(), *(tuple(plan) for plan in golden.tensor("route.plans").tolist())]
        rows, num_blocks = range(len(routes)), golden.count("route.b", ".z0")
        stream = prefix.fork(len(rows), self._text(0, len(rows)))
        for block in range(num_blocks):
            names = [f"route.g{g}.b{block}" for g in rows]
            routed = routes if block < golden.size("routed_blocks") else None
            self._block(stream, "route", names, f"route.b{block}", routed)
        stream.release()
        stream = prefix.fork(len(rows), self._text(0, len(rows)))
        for block in range(num_blocks):
            for step, sigma in enumerate(self.world.stream.steps):
                states = [self._frames(f"route.g{g}.b{block}.z{step}") for g in rows]
                velocity = stream.velocity(torch.stack(states), sigma)
                for g in rows:
                    self._compare("replay", f"replay.g{g}.b{block}.v{step}", velocity[g])
            stream.commit(torch.stack([self._frames(f"route.g{g}.b{block}.x0") for g in rows]))
        stream.release()
        prefix.release()

    def _block(
        self, stream: Stream, run: str, names: Sequence[str], noise: str,
        routed: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Generate and commit one block of every row; compare states, velocities and result."""
        eps = self.golden.tensor(f"{noise}.eps").to(self._device).transpose(1, 2)
        draws = [self._frames(f"{noise}.z0"), *eps]
        record = denoise_block(
            stream, lambda step: draws[step].expand(len(names), *draws[0].shape), routed
        )
        for row, name in enumerate(names):
            for step in range(len(record.states)):
                self._compare(run, f"{name}.z{step}", record.states[step][row])
                self._compare(run, f"{name}.v{step}", record.velocities[step][row])
            self._compare(run, f"{name}.x0", record.clean[row])
        stream.commit(record.clean, routed)
        return record.clean

    def _compare(self, run: str, name: str, ours: Tensor, theirs: Tensor | None = None) -> None:
        theirs = self._frames(name) if theirs is None else theirs.to(ours.device)
        if ours.shape != theirs.shape:
            raise ValueError(f"{name} is {list(theirs.shape)}, ours {list(ours.shape)}")
        scale = theirs.abs().max().item() or 1.0
        error = (ours - theirs).abs().max().item() / scale
        self.compared.add(name)
        self.runs.setdefault(run, Largest()).see(error, name)

    def _frames(self, name: str) -> Tensor:
        """A recorded [C, F, H, W] as [F, C, H, W] on the model's device."""
        return self.golden.tensor(name).to(self._device).transpose(0, 1)

    def _text(self, index: int, rows: int = 1) -> TextKeys:
        """A text of the file, padded with zeros, for every row."""
        config, tokens = self.world.model.model_config, self.golden.tensor(f"text.{index}")
        padded = torch.zeros(1, config.text_length, config.text_dim, device=self._device)
        padded[0, : len(tokens)] = tokens
        keys = self.world.model.encode_text(padded)
        return keys.select(torch.zeros(rows, dtype=torch.long, device=self._device))

    @property
    def _device(self) -> torch.device:
        return self.world.pool.key.device


def _bank_norms(stream: Stream) -> Tensor:
    """Norm of the keys in each slot of the first row's bank: [layers, slots], 0 where empty."""
    world, slots = stream.world, stream.banks[0].slots
    filled = world.pool.key[:, slots].float().square().sum(dim=(2, 3, 4))
    for axis in (world.model.spec.ranks.tensor, world.model.spec.ranks.context):
        dist.all_reduce(filled, group=axis.group)
    norms = filled.new_zeros(len(filled), world.memory.bank_frames)
    norms[:, : len(slots)] = filled.sqrt()
    return norms


def replay_file(
    path: Path, parallel: ParallelConfig, device: str = "cpu", dtype: Dtype = "float32", *,
    quiet: bool = True,
) -> Comparison:  # fmt: skip
    """Every run of a golden file, over the ranks that torchrun started or on one.

    Collective; leaves the ranks again. The errors are the largest over all ranks.

    Raises:
        ValueError: the file is not of the format, or the layout does not fit it or the ranks.
    """
    golden = GoldenFile.read(path)
    ranks = start_ranks(parallel, device)  # type: ignore[arg-type]
    try:
        if ranks.device.type == "cpu":
            torch.set_num_threads(1)  # the tensors are tiny: more threads are many times slower
        if not quiet:
            log.setup(is_first(ranks))
        found = Comparison(golden, build_world(golden, parallel, ranks, dtype))
        pages = found.world.pool.num_free
        found.run_all()
        if found.world.pool.num_free != pages:
            raise RuntimeError(f"{pages - found.world.pool.num_free} pages were not given back")
        worst = torch.tensor(list(found.errors.values()), dtype=torch.float64, device=ranks.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        for largest, error in zip(found.runs.values(), worst.tolist(), strict=True):
            largest.error = error
    finally:
        stop_ranks()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a file and report. 0 if every error is within the tolerance, else 1."""
    options = _parse(arguments)
    parallel = ParallelConfig(
        tensor=options.tensor, context=options.context,
        sequence_parallel=options.sequence_parallel,
    )  # fmt: skip
    found = replay_file(options.file, parallel, options.device, options.dtype, quiet=False)
    logger.info("%-12s %8s  %-9s  %s", "run", "tensors", "error", "largest at")
    for run, largest in found.runs.items():
        logger.info("%-12s %8d  %.3e  %s", run, largest.count, largest.error, largest.name)
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    above = [run for run, error in found.errors.items() if not error <= tolerance]
    if above:
        logger.error("%s: above the tolerance of %g", ", ".join(above), tolerance)
    return 1 if above else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="golden vectors, safetensors")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share the heads")
    parser.add_argument("--sequence-parallel", action="store_true", help="tokens over these too")
    parser.add_argument("--context", type=int, default=1, help="ranks that share the tokens")
    parser.add_argument("--tolerance", type=float, help="largest error allowed, if not the dtype's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(TOLERANCES), default="float32")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    log.run_command(main, logger)
