"""Checkpoints of Wan, LongLive and MemFlow into ours, and ours into what other programs read.

    python -m tools.convert_checkpoint inspect longlive_base.pt
    python -m tools.convert_checkpoint import longlive_base.pt OUT --adapter lora.pt
    python -m tools.convert_checkpoint export OUT FOLDER --to diffusers
    python -m tools.convert_checkpoint verify OUT FOLDER

SOURCE, A and B are of any form: see docs/checkpoints.md. Under torchrun, import takes a share of
every tensor on each rank. Exit code 1 if something is refused or differs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_kvpo import log
from megatron_kvpo.checkpoint.convert import (
    describe,
    differences,
    import_checkpoint,
    relative_error,
)
from megatron_kvpo.checkpoint.export import (
    Order,
    Weights,
    diffusers_config,
    export,
    plan_adapter,
    plan_base,
)
from megatron_kvpo.checkpoint.formats import Checkpoint, open_checkpoint
from megatron_kvpo.config import ModelConfig, ParallelConfig, PolicyConfig
from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import SLOTS
from megatron_kvpo.model.specs import Spec
from megatron_kvpo.parallel.groups import Ranks, is_first, start_ranks, stop_ranks

logger = log.get_logger("megatron_kvpo.tools.convert_checkpoint")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SMALL = 50_000_000
"""Parameters up to which an export's output is compared without being asked for."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of outputs over the largest output, by the type that was written."""

_FRAMES, _TEXT_TOKENS, _TIMESTEP = 3, 8, 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. 0 if it did what it should."""
    options = _parse(arguments)
    log.setup(os.environ.get("RANK", "0") == "0")
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "import": _import, "export": _export, "verify": _verify, "inspect": _inspect,
    }  # fmt: skip
    try:
        return commands[options.command](options)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 1


def _import(options: argparse.Namespace) -> int:
    sources = [open_checkpoint(options.source, key=options.key, slot=options.slot)]
    if options.adapter is not None:
        sources.append(open_checkpoint(options.adapter, key=options.adapter_key))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = start_ranks(ParallelConfig(tensor=options.tensor or world), "cpu")
    try:
        path = import_checkpoint(
            sources, options.out, ranks, dtype=DTYPES.get(options.dtype), alpha=options.alpha,
            heads=options.heads, layers=options.layers,
        )  # fmt: skip
        if is_first(ranks):
            logger.info("%s: %s", path, _counts(open_checkpoint(path)))
    finally:
        stop_ranks()
    return 0


def _counts(checkpoint: Checkpoint) -> str:
    facts = describe(checkpoint)
    return f"{facts['tensors']} tensors, {facts['parameters']:,} parameters, {facts['dtypes']}"


def _export(options: argparse.Namespace) -> int:
    source = open_checkpoint(options.source, key=options.key, slot=options.slot)
    adapter = None
    if options.adapter is not None:
        adapter = open_checkpoint(options.adapter, key=options.adapter_key)
    weights = Weights.of(
        source, adapter, alpha=options.alpha, heads=options.heads, layers=options.layers
    )
    order = Order(
        to=options.to, keys=options.keys, dtype=DTYPES.get(options.dtype), part=options.part,
        shard_bytes=int(options.shard_gb * 1e9),
    )  # fmt: skip
    if order.to in ("original", "diffusers") and weights.adapter is not None:
        logger.warning("the adapter stays out of %s: --to merged or peft takes it", options.out)
    forward = _wants_forward(options.prove, weights, order)
    ranks = start_ranks(ParallelConfig(), "cpu") if forward else None
    said: list[str] = []

    def prove(path: Path) -> None:
        if ranks is not None:
            error = prove_forward(weights, order, path, ranks)
            said.append(f"outputs agree to {error:.1e}")

    try:
        count = export(weights, options.out, order, prove)
    finally:
        if ranks is not None:
            stop_ranks()
    logger.info(
        "%s: %d tensors, read back bit for bit; %s", options.out, count,
        said[0] if said else "outputs not compared",
    )  # fmt: skip
    return 0


def _wants_forward(prove: str, weights: Weights, order: Order) -> bool:
    """Whether there is an output to compare, and whether it is asked for or cheap."""
    others = order.to in ("diffusers", "merged") or (
        order.to == "peft" and order.keys != "original"
    )
    can = others and weights.base is not None
    if prove == "forward" and not can:
        raise ValueError(
            "--prove forward needs a base, and an export to diffusers, merged or peft with "
            "diffusers' keys"
        )
    numbers = sum(torch.Size(row.shape).numel() for row in weights.table.values())
    return can and (prove == "forward" or (prove == "auto" and numbers <= SMALL))


@torch.no_grad()
def prove_forward(weights: Weights, order: Order, path: Path, ranks: Ranks) -> float:
    """Compare the output of what was written, run by diffusers (and PEFT), with ours.

    Returns the largest difference over the largest output. ValueError above TOLERANCE.
    """
    latent, text = _inputs(weights)
    adapted = order.to in ("peft", "merged")
    ours = _our_output(weights, order, ranks, latent, text, adapted=adapted)
    theirs = _their_output(weights, order, path, latent, text)
    error = relative_error(theirs, ours)
    limit = TOLERANCE[order.dtype or torch.float32]
    if order.dtype is None and order.to == "merged":  # merging rounds to the base's own type
        limit = max(TOLERANCE[p.header.dtype] for p in plan_base(weights, "original", None))
    if error > limit:
        raise ValueError(f"{path}: its output differs from ours by {error:.2g}, above {limit:g}")
    return error


def _inputs(weights: Weights) -> tuple[Tensor, Tensor]:
    """latent_BFCHW of three latent frames, 2 x 2 tokens each, and text_BXD."""
    sizes, rng = weights.sizes, torch.Generator().manual_seed(1)
    _, height, width = sizes.patch
    shape = (1, _FRAMES, sizes.channels, 2 * height, 2 * width)
    text = torch.randn(1, _TEXT_TOKENS, sizes.text, generator=rng)
    return torch.randn(shape, generator=rng), text


def _our_output(
    weights: Weights, order: Order, ranks: Ranks, latent: Tensor, text: Tensor, *, adapted: bool
) -> Tensor:
    sizes = weights.sizes
    assert weights.heads is not None
    config = ModelConfig(
        hidden_dim=sizes.hidden, ffn_dim=sizes.ffn, num_layers=sizes.layers,
        num_heads=weights.heads, latent_channels=sizes.channels, latent_height=latent.shape[-2],
        latent_width=latent.shape[-1], patch=sizes.patch, text_dim=sizes.text,
        text_length=_TEXT_TOKENS, sinusoid_dim=sizes.sinusoid,
    )  # fmt: skip
    policy = PolicyConfig(lora_rank=sizes.rank, lora_alpha=weights.alpha) if adapted else None
    model = CausalWan(config, Spec.build(config, ParallelConfig(), ranks, policy))
    dtype = None if order.to == "merged" else order.dtype
    for planned in plan_base(weights, "original", None if adapted else dtype):
        model.get_parameter(planned.own).copy_(planned.read())
    if adapted:
        for planned in plan_adapter(weights, "", dtype, diffusers=False):
            module, _, half = planned.own.rpartition(".")
            model.get_parameter(f"{module}.adapter.{half}.current").copy_(planned.read())
        model.spec.switch.slot = "current"
    timestep = torch.full((1, 1), _TIMESTEP)
    return model(latent, timestep, range(_FRAMES), model.encode_text(text))  # type: ignore[no-any-return]


def _their_output(
    weights: Weights, order: Order, path: Path, latent: Tensor, text: Tensor
) -> Tensor:
    from diffusers import WanTransformer3DModel

    assert weights.heads is not None
    net: Any
    if order.to == "diffusers" or order.keys == "diffusers":
        net = WanTransformer3DModel.from_pretrained(path, torch_dtype=torch.float32)
    else:
        if order.to == "merged":
            written = Weights.of(open_checkpoint(path), heads=weights.heads)
        else:
            written = weights
        net = WanTransformer3DModel.from_config(diffusers_config(weights.sizes, weights.heads))
        planned = plan_base(written, "diffusers", torch.float32)
        net.load_state_dict({p.name: p.read() for p in planned})
    if order.to == "peft":
        from peft import PeftModel

        net = PeftModel.from_pretrained(net, str(path))
    timestep = torch.full((1,), _TIMESTEP)
    out = net.eval()(latent.transpose(1, 2), timestep, text, return_dict=False)[0]
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _verify(options: argparse.Namespace) -> int:
    first = open_checkpoint(options.a, key=options.key, slot=options.slot)
    second = open_checkpoint(options.b, key=options.key_b, slot=options.slot)
    found = list(differences(first, second, options.tolerance))
    for line in found[:20]:
        logger.error("%s", line)
    if found:
        logger.error("%d tensors differ between %s and %s", len(found), options.a, options.b)
        return 1
    how = "agree" if options.tolerance else "are equal, bit for bit"
    logger.info("all %d tensors of %s and %s %s", len(first.stored), options.a, options.b, how)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    log.emit_result(json.dumps(describe(open_checkpoint(options.source, key=options.key,
                                                        slot=options.slot))))  # fmt: skip
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_checkpoint", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("import", help="any form into our distributed checkpoint")
    give = commands.add_parser("export", help="any form into another program's")
    compare = commands.add_parser("verify", help="two checkpoints, tensor by tensor")
    look = commands.add_parser("inspect", help="what a checkpoint is, as one line of JSON")
    for command in (take, give, look):
        command.add_argument("source", type=Path)
    for command in (take, give):
        command.add_argument("out", type=Path)
        command.add_argument("--adapter", type=Path, help="adapter that belongs to the source")
        command.add_argument("--adapter-key", help="part of its .pt file")
        command.add_argument("--alpha", type=float, help="of an adapter whose file does not say")
        command.add_argument("--heads", type=int, help="if no config.json says")
        command.add_argument("--layers", type=int, help="if neither config.json nor preset fit")
        command.add_argument("--dtype", choices=["keep", *DTYPES], default="keep")
    compare.add_argument("a", type=Path)
    compare.add_argument("b", type=Path)
    compare.add_argument("--key-b", help="part of b, if it is a .pt file")
    compare.add_argument("--tolerance", type=float, default=0.0, help="0 compares bits")
    for command in (take, give, compare, look):
        command.add_argument("--key", help="part of a .pt file, such as generator_ema")
        command.add_argument("--slot", choices=SLOTS, default="current", help="of a run's policies")
    take.add_argument("--tensor", type=int, help="tensor ranks; all ranks if not given")
    targets = ["original", "diffusers", "peft", "comfyui", "merged"]
    give.add_argument("--to", choices=targets, required=True)
    give.add_argument("--keys", choices=targets[:2] + targets[3:4], help="for peft and merged")
    give.add_argument("--part", choices=["base", "adapter"], help="for comfyui")
    give.add_argument("--shard-gb", type=float, default=5.0, help="largest file of a folder")
    give.add_argument("--prove", choices=["auto", "bits", "forward"], default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
