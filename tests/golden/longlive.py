"""Replays the golden LongLive runs with our model: the largest relative error of each run.

The numbers in longlive_tiny.safetensors were taken once from the public model (NVlabs/LongLive)
on tiny random weights, in float32 on a CPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_kvpo.config import ModelConfig, ParallelConfig, RoutingConfig, StreamConfig
from megatron_kvpo.model.causal_wan import CausalWan, TextKeys
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.model.weights import load_weights
from megatron_kvpo.parallel.groups import Ranks
from megatron_kvpo.rollout.sampler import denoise_block
from megatron_kvpo.rollout.stream import Stream, World, new_world

FILE = Path(__file__).with_name("longlive_tiny.safetensors")


class Golden:
    """The file, the model built from it, and the errors seen so far."""

    def __init__(self, parallel: ParallelConfig, ranks: Ranks) -> None:
        with safe_open(FILE, "pt") as file:
            sizes = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.sizes = sizes
        config = ModelConfig(
            hidden_dim=sizes["dim"], ffn_dim=sizes["ffn_dim"], num_layers=sizes["num_layers"],
            num_heads=sizes["num_heads"], text_dim=sizes["text_dim"],
            text_length=sizes["text_len"], latent_height=sizes["latent_h"],
            latent_width=sizes["latent_w"],
        )  # fmt: skip
        model = CausalWan(config, Spec.build(config, parallel, ranks, None))
        weights = {n[8:]: t for n, t in self.tensors.items() if n.startswith("weights.")}
        load_weights(model, weights, str(FILE))
        self.world: World = new_world(model, StreamConfig(), RoutingConfig(), rows=6)
        self.model = model
        self.errors: dict[str, float] = {}
        self.compared: set[str] = set()

    def text(self, index: int, rows: int = 1) -> TextKeys:
        tokens = self.tensors[f"text.{index}"]
        padded = torch.zeros(1, self.sizes["text_len"], self.sizes["text_dim"])
        padded[0, : len(tokens)] = tokens
        with torch.no_grad():
            keys = self.model.encode_text(padded)
        return keys.select(torch.zeros(rows, dtype=torch.long))

    def compare(self, run: str, name: str, ours: Tensor) -> None:
        theirs = self.tensors[name].transpose(0, 1)
        self.compared.add(name)
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        self.errors[run] = max(self.errors.get(run, 0.0), error)

    def block(
        self, stream: Stream, run: str, names: list[str], noise: str, routed: object
    ) -> Tensor:
        """Generate and commit one block of every row; compare states, velocities and result."""
        z0 = self.tensors[f"{noise}.z0"].transpose(0, 1)
        eps = self.tensors[f"{noise}.eps"].transpose(1, 2)
        rows = len(names)
        draws = [z0, *eps]
        record = denoise_block(
            stream, lambda step: draws[step].expand(rows, *z0.shape), routed  # type: ignore[arg-type]
        )  # fmt: skip
        for row, name in enumerate(names):
            for step in range(4):
                self.compare(run, f"{name}.z{step}", record.states[step][row])
                self.compare(run, f"{name}.v{step}", record.velocities[step][row])
            self.compare(run, f"{name}.x0", record.clean[row])
        stream.commit(record.clean, routed)  # type: ignore[arg-type]
        return record.clean

    def run_stream(self, run: str, switch_frame: int | None) -> None:
        stream, blocks = Stream.begin(self.world, 1, self.text(0)), []
        num_blocks = sum(n.startswith(f"{run}.") and n.endswith(".x0") for n in self.tensors)
        assert num_blocks >= 5
        for block in range(num_blocks):
            if stream.frame == switch_frame:
                stream.recache(self.text(1), torch.cat(blocks, dim=1))
            name = f"{run}.b{block}"
            blocks.append(self.block(stream, run, [name], name, None))
        stream.release()

    def run_route_and_replay(self) -> None:
        """Three blocks after the `stream` prefix, four branches as one batch; then their replay."""
        stream = Stream.begin(self.world, 1, self.text(0))
        for block in range(self.sizes["fork_frame"] // 3):
            name = f"stream.b{block}"
            self.block(stream, "prefix", [name], name, None)
        plans = self.tensors["route.plans"].tolist()
        routes = [(), *(tuple(plan) for plan in plans)][:4]
        branches = stream.fork(len(routes), self.text(0, len(routes)))
        for block in range(3):
            names = [f"route.g{g}.b{block}" for g in range(len(routes))]
            routed = routes if block < self.sizes["routed_blocks"] else None
            self.block(branches, "route", names, f"route.b{block}", routed)
        branches.release()
        replay = stream.fork(len(routes), self.text(0, len(routes)))
        with torch.no_grad():
            for block in range(3):
                self._replay_block(replay, block, len(routes))
        replay.release()
        stream.release()

    def _replay_block(self, stream: Stream, block: int, rows: int) -> None:
        def recorded(what: str) -> Tensor:
            names = [f"route.g{g}.b{block}.{what}" for g in range(rows)]
            return torch.stack([self.tensors[n].transpose(0, 1) for n in names])

        for step, sigma in enumerate(self.sizes["sigmas"]):
            velocity = stream.velocity(recorded(f"z{step}"), sigma)
            for g in range(rows):
                self.compare("replay", f"replay.g{g}.b{block}.v{step}", velocity[g])
        stream.commit(recorded("x0"))
