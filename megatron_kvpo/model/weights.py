"""Filling a model: from seeds or from a file, the same weights however the ranks share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_kvpo.model.causal_wan import CausalWan
from megatron_kvpo.model.lora import SLOTS, Adapter, initial_bound, partition_of
from megatron_kvpo.parallel.groups import Axis
from megatron_kvpo.parallel.seeds import device_generator

PREFIXES = (
    "generator.", "generator_ema.", "model.", "module.", "base_model.", "diffusion_model.",
    "transformer.",
)  # fmt: skip
"""Wrappers' names that released files carry before the model's own."""

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.")
"""Names of wrapped modules: they stand anywhere in a name."""


def local_part(whole: Tensor, parameter: Tensor, axis: Axis) -> Tensor:
    """This tensor rank's slice of a whole weight, cut as `parameter` is."""
    dim = partition_of(parameter)
    return whole if dim is None else whole.chunk(axis.size, dim)[axis.rank]


def whole_value(parameter: Tensor, axis: Axis) -> Tensor:
    """The whole weight that `parameter` is a slice of. Collective over the tensor ranks."""
    dim, value = partition_of(parameter), parameter.detach()
    if dim is None or axis.size == 1:
        return value.clone()
    parts = [torch.empty_like(value) for _ in range(axis.size)]
    dist.all_gather(parts, value.contiguous(), group=axis.group)
    return torch.cat(parts, dim)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters other than adapters, by released name."""
    return ((n, p) for n, p in model.named_parameters() if ".adapter." not in n)


def whole_shape(parameter: Tensor, axis: Axis) -> list[int]:
    """Shape of the whole weight that `parameter` is this tensor rank's slice of."""
    shape, dim = list(parameter.shape), partition_of(parameter)
    if dim is not None:
        shape[dim] *= axis.size
    return shape


@torch.no_grad()
def initialise(model: CausalWan, seed: int, *, on_device: bool = False) -> None:
    """Random weights, drawn whole per name so that any layout gets the same model.

    Matrices are Xavier-uniform, the time and text embeddings and the head normal with 0.02,
    modulation normal with 1 / sqrt(D), norms 1, biases 0. `on_device` draws them there: fast, and
    other numbers than a CPU draws.
    """
    axis = model.spec.ranks.tensor
    device = model.spec.ranks.device if on_device else torch.device("cpu")
    for name, parameter in base_parameters(model):
        shape = whole_shape(parameter, axis)
        rng = device_generator(device, "initialise", seed, name)
        whole = torch.zeros(shape, device=device)
        if "norm" in name and name.endswith("weight"):
            whole.fill_(1.0)
        elif name.endswith("modulation"):
            whole.normal_(0, shape[-1] ** -0.5, generator=rng)
        elif name.endswith("weight") and name.startswith(("time_", "text_", "head.")):
            whole.normal_(0, 0.02, generator=rng)
        elif name.endswith("weight"):
            flat = whole.view(shape[0], -1)
            bound = (6 / (flat.shape[0] + flat.shape[1])) ** 0.5
            whole.uniform_(-bound, bound, generator=rng)
        parameter.copy_(local_part(whole, parameter, axis))


@torch.no_grad()
def initialise_adapters(model: CausalWan, seed: int, *, on_device: bool = False) -> None:
    """A kaiming-uniform(sqrt 5), B zero, the same in every slot. Freezes the base."""
    axis = model.spec.ranks.tensor
    device = model.spec.ranks.device if on_device else torch.device("cpu")
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if not isinstance(module, Adapter):
            continue
        down = module.lora_A["current"]
        shape = whole_shape(down, axis)
        bound = initial_bound(shape[1])
        rng = device_generator(device, "lora", seed, name)
        whole = torch.empty(shape, device=device).uniform_(-bound, bound, generator=rng)
        for slot in SLOTS:
            module.lora_A[slot].copy_(local_part(whole, down, axis))
            module.lora_B[slot].zero_()


def bare_name(name: str) -> str:
    """A tensor's own name, without those of the wrappers it was saved in."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


@torch.no_grad()
def load_weights(model: CausalWan, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy whole weights into this rank's share. ValueError names what is missing or foreign."""
    own, axis = dict(base_parameters(model)), model.spec.ranks.tensor
    missing, foreign = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or foreign:
        raise ValueError(
            f"{source} does not fit the model: {len(missing)} tensors missing (first: "
            f"{missing[:3]}), {len(foreign)} unknown (first: {foreign[:3]}); check the model's "
            "sizes"
        )
    for name, parameter in own.items():
        shape = whole_shape(parameter, axis)
        if list(tensors[name].shape) != shape:
            raise ValueError(
                f"{source}: {name} is {list(tensors[name].shape)}, the model needs {shape}"
            )
    for name, parameter in own.items():
        parameter.copy_(local_part(tensors[name].to(parameter), parameter, axis))


def save_weights(model: CausalWan, path: Path, dtype: torch.dtype, note: dict[str, str]) -> None:
    """Write the whole base in the released key format. Collective; the first rank writes."""
    axis = model.spec.ranks.tensor
    whole = {
        n: whole_value(p, axis).to("cpu", dtype).contiguous() for n, p in base_parameters(model)
    }
    if model.spec.ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, path, metadata=note)
