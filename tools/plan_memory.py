"""Bytes on one rank's GPU, term by term: what torch.cuda.max_memory_allocated counts in an update.

Parameters are those of the model itself, built without memory. What activations take is reckoned
in elements a token, and two such numbers are fitted to passes (docs/benchmarks/passes).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_kvpo.config import ModelConfig, ParallelConfig, RunConfig
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import SLOTS, partition_of
from megatron_kvpo.model.recompute import planned, reserve_bytes
from megatron_kvpo.model.specs import AdaptedLinear, Spec
from megatron_kvpo.parallel.groups import start_ranks, stop_ranks
from megatron_kvpo.records import Prompt
from tools.plan_count import pages_of, rollout_rows

GIB = 2**30

_FLOAT = 4
_FORWARD_WIDTH = 13.0
"""Elements a token, in hidden sizes, of a pass without a graph at its peak: one layer's keys and
values of a window of 4 blocks (8), q, k and v, the residual and its norm. Fits `passes` of 8 and 9
rows: 1.40 and 1.57 GiB above what is held."""

_GRAPH_WIDTH = 12.9
"""The same of one block that keeps its activations, without its gathered keys and values, its
adapters' narrow products and twice its wide layer: 13.7 GiB more for a row more of 30 blocks."""

_WHOLE_INPUTS = 3
"""Of these, what tensor ranks that share tokens keep whole: the inputs of their column layers."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter: this rank's share of it is size / tensor ranks if it is `sharded`."""

    numel: int
    bytes_each: int
    sharded: bool
    slot: str | None = None
    """Of the adapters, if it is one's."""

    down: bool = False
    """Whether it is an adapter's A."""

    layer: tuple[int, int] | None = None
    """Outputs and inputs of a linear layer that adapters act beside."""

    family: str = ""
    """That model.fp8 names."""


_known: dict[str, tuple[Weight, ...]] = {}


def weights_of(config: RunConfig) -> tuple[Weight, ...]:
    """Every parameter of the recipe's model, whole. ValueError unless the policy is an adapter."""
    if config.policy.mode != "lora":
        raise ValueError(
            f"policy.mode is {config.policy.mode}: only runs with adapters are planned, set "
            "policy.mode to lora"
        )
    key = repr((config.model, config.policy.lora_rank))
    if key not in _known:
        _known[key] = _built(config)
    return _known[key]


def _built(config: RunConfig) -> tuple[Weight, ...]:
    whole = ParallelConfig()
    ranks = start_ranks(whole, "cpu")
    try:
        bare = dataclasses.replace(config.model, fp8=())  # 8 bits would ask for a GPU
        ranks = dataclasses.replace(ranks, device=torch.device("meta"))
        with torch.device("meta"):
            model = CausalWan(bare, Spec.build(bare, whole, ranks, config.policy))
    finally:
        stop_ranks()
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    found = []
    for name, parameter in model.named_parameters():
        parts, layer = name.split("."), None
        slot = parts[-1] if ".adapter." in name and parts[-1] in SLOTS else None
        if name in linear:
            layer = (parameter.shape[0], parameter.shape[1])
        found.append(Weight(
            parameter.numel(), parameter.element_size(), partition_of(parameter) is not None, slot,
            ".lora_A." in name, layer, _family(name),
        ))  # fmt: skip
    return tuple(found)


def _family(name: str) -> str:
    kinds = {".ffn.": "ffn", ".self_attn.": "attention", ".cross_attn.": "text"}
    return next((family for part, family in kinds.items() if part in name), "")


def trained_numbers(config: RunConfig, tensor: int) -> int:
    """Numbers that one rank trains."""
    own = (w for w in weights_of(config) if w.slot == "current")
    return sum(w.numel // (tensor if w.sharded else 1) for w in own)


def static_bytes(
    config: RunConfig, parallel: ParallelConfig, replicas: int, groups: int = 1
) -> dict[str, float]:  # fmt: skip
    """What is there all the time, but for pages: weights, copies, adapters, gradients, moments.

    Args:
        config: model, policy and optimizer.
        parallel: the model ranks' shares.
        replicas: ranks that hold the same weights, branch x data x context.
        groups: of one data rank: from the second on gradients are held twice.
    """
    tensor = parallel.tensor

    def share(weight: Weight) -> float:
        return weight.numel / (tensor if weight.sharded else 1)

    found = dict.fromkeys(("weights", "margins", "merged", "fp8", "slots", "acting"), 0.0)
    rank, width = config.policy.lora_rank, config.model.torch_dtype.itemsize
    for weight in weights_of(config):
        if weight.slot is not None:
            found["slots"] += share(weight) * weight.bytes_each
            if weight.slot == "current" and width != _FLOAT:
                found["acting"] += share(weight) * width * weight.down
            continue
        found["weights"] += share(weight) * weight.bytes_each
        if weight.layer is None:
            continue
        eight = weight.family in config.model.fp8
        outputs = weight.layer[0] / (tensor if _by_outputs(weight) else 1)
        margin = config.policy.merge or not eight  # as Weight.prepare has it
        found["margins" if margin else "acting"] += outputs * rank * width
        if eight:  # a byte each, and a unit for each output
            found["fp8"] += share(weight) + outputs * _FLOAT
        elif config.policy.merge:
            found["merged"] += share(weight) * width
    trained = trained_numbers(config, tensor) * _FLOAT
    found["gradients"] = trained * (1 if groups == 1 else 2)
    found["moments"] = 2.0 * trained / (replicas if config.optimizer.distributed else 1)
    return found


def _by_outputs(weight: Weight) -> bool:
    """Whether a layer is cut along its outputs: all but those that narrow a wide input."""
    assert weight.layer is not None
    return weight.layer[0] >= weight.layer[1]


def page_bytes(model: ModelConfig, parallel: ParallelConfig) -> float:
    """One latent frame's keys and values in all layers, this rank's heads."""
    numbers = 2 * model.num_layers * model.tokens_per_frame * model.hidden_dim
    return numbers * model.torch_dtype.itemsize / (parallel.tensor * parallel.context)


def text_bytes(model: ModelConfig, parallel: ParallelConfig) -> float:
    """One row's text keys and values in all layers."""
    numbers = 2 * model.num_layers * model.text_length * model.hidden_dim
    return numbers * model.torch_dtype.itemsize / parallel.tensor


def sequence_bytes(config: RunConfig) -> tuple[float, float]:
    """One row's latents of the whole video, and its states and velocities, float32."""
    model, stream = config.model, config.stream
    frame = model.latent_channels * model.latent_height * model.latent_width * _FLOAT
    window = config.routing.num_routed_blocks * stream.block_frames * len(stream.steps)
    return float(stream.num_frames * frame), float(2 * window * frame)


def forward_bytes(config: RunConfig, parallel: ParallelConfig, rows: int) -> float:
    """What a pass without a graph needs for a moment; of few rows, the graph's text instead."""
    model = config.model
    if rows <= model.cuda_graph_rows:
        return rows * text_bytes(model, parallel)
    tokens = rows * config.stream.block_frames * model.tokens_per_frame
    numbers = tokens * model.hidden_dim * _FORWARD_WIDTH
    if not config.policy.merge:  # the adapter's margin behind the input of the wide layer
        numbers += tokens * (model.hidden_dim + config.policy.lora_rank)
    return numbers * model.torch_dtype.itemsize / (parallel.tensor * parallel.context)


def block_bytes(config: RunConfig, parallel: ParallelConfig, rows: int) -> float:
    """Activations of one transformer block that keeps them, for its backward."""
    model, stream = config.model, config.stream
    tokens = rows * stream.block_frames * model.tokens_per_frame / parallel.context
    dim, keys = model.hidden_dim, stream.window_frames / stream.block_frames
    shared = (_GRAPH_WIDTH + 2 * keys) * dim + 2 * model.ffn_dim
    whole = 0.0
    if parallel.tensor > 1:
        shared, whole = shared - _WHOLE_INPUTS * dim, _WHOLE_INPUTS * dim
        if not parallel.sequence_parallel:  # residuals and norms are whole as well
            shared, whole = shared - 6 * dim, whole + 6 * dim
    numbers = shared / parallel.tensor + whole + 10 * config.policy.lora_rank
    return tokens * numbers * model.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Memory:
    """What a rank takes, in GiB."""

    terms: dict[str, float]
    """At the peak; they sum up to it."""

    moment: str
    """When that is."""

    least: float
    """The peak if all blocks recompute that may: what cannot be helped."""

    recomputed: float
    """Share of the blocks that recompute in backward."""

    @property
    def peak(self) -> float:
        """Sum of the terms."""
        return sum(self.terms.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a recipe is to run."""

    parallel: ParallelConfig
    data: int
    groups: int
    """Prompts of one data rank in an update."""

    limit_gib: float
    """What a rank may allocate."""

    lent: int = 0
    """Pages that are idle while a branch goes backward."""

    reward_gib: float = 0.0
    """Of reward models in the training process."""


def memory(config: RunConfig, prompts: tuple[Prompt, ...], place: Place) -> Memory:
    """Terms at the peak of an update, in its rollouts or its backward passes."""
    parallel, model = place.parallel, config.model
    replicas = parallel.branch * place.data * parallel.context
    held = static_bytes(config, parallel, replicas, place.groups)
    pages = pages_of(config, prompts, parallel.branch, place.groups)
    held["pages"] = pages * page_bytes(model, parallel)
    held["reward models"] = place.reward_gib * GIB
    latents, trajectory = sequence_bytes(config)
    sequences, rows = config.routing.num_branches + 1, rollout_rows(config, parallel.branch)
    own = -(-sequences // parallel.branch)
    graphs = min(rows, model.cuda_graph_rows) * text_bytes(model, parallel)
    rollout = dict(held)
    rollout["latents"] = place.groups * own * (latents + trajectory) + rows * latents
    rollout["text keys"] = rows * text_bytes(model, parallel) + graphs
    rollout["activations"] = forward_bytes(config, parallel, rows)
    batch = min(config.policy.max_rows, config.routing.num_branches)
    backward = dict(held)
    whole = sequences + (own if parallel.branch > 1 else 0)
    backward["latents"] = place.groups * whole * (latents + trajectory) + batch * latents
    backward["text keys"] = 2 * batch * text_bytes(model, parallel) + graphs
    kept, least, recomputed = _activations(config, place, backward, batch)
    backward["activations"] = kept
    moments = {"rollout": rollout, "backward": backward}
    name = max(moments, key=lambda name: sum(moments[name].values()))
    lowest = max(sum(rollout.values()), sum(backward.values()) - kept + least)
    return Memory({k: v / GIB for k, v in moments[name].items()}, name, lowest / GIB, recomputed)


def _activations(
    config: RunConfig, place: Place, held: dict[str, float], rows: int
) -> tuple[float, float, float]:  # fmt: skip
    """Bytes outside pages, the fewest possible, and the share of blocks that recompute."""
    blocks, mode = config.model.num_layers, config.model.recompute
    size = block_bytes(config, place.parallel, rows)
    tokens = rows * config.stream.block_frames * config.model.tokens_per_frame
    parts = place.parallel.context * (
        place.parallel.tensor if place.parallel.sequence_parallel else 1
    )
    own = tokens * config.model.hidden_dim * config.model.torch_dtype.itemsize / parts
    least = 2 * size + blocks * own
    if mode is False:
        return (blocks + 0.5) * size, (blocks + 0.5) * size, 0.0
    if mode is True:
        return least, least, 1.0
    lent = place.lent * page_bytes(config.model, place.parallel)
    inside = min(blocks, int(lent // (size + size / 16)))
    free = int(place.limit_gib * GIB - sum(held.values())) - reserve_bytes(int(size))
    kept, spared = planned(blocks - inside, free, int(size), int(own), [int(own)])
    again = blocks - inside - kept
    whole = kept + min(1, inside)  # updates, which lend, were measured with one more
    taken = (whole + 0.5) * size + (again + spared) * own
    return max(taken, least), least, again / blocks
