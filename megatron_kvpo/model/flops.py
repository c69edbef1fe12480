"""Floating-point operations of a pass, from its shapes: the measure of a share of the hardware."""

from __future__ import annotations

from megatron_kvpo.config import ModelConfig

PEAKS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0,
    "A100": 312.0,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s by a part of a GPU's name, the longer parts first (NVIDIA's data sheets).
log.peak_tflops says that of others."""


def peak_of(device: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by its name; None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def forward_flops(
    model: ModelConfig, tokens: int, keys: float, lora_rank: int = 0
) -> dict[str, int]:
    """Operations of one row's forward pass, by kind: linear, attention, text, lora.

    A multiplication and an addition are two. The embeddings, the head and all that is elementwise
    are left out: below a hundredth at Wan's sizes.

    Args:
        model: sizes.
        tokens: queries of the pass.
        keys: tokens that each of them attends to, on the mean.
        lora_rank: of adapters that act beside the weights; 0: none, or merged.
    """
    dim, wide, layers = model.hidden_dim, model.ffn_dim, model.num_layers
    linear = 2 * tokens * (6 * dim * dim + 2 * dim * wide)  # q, k, v, o; q, o of the text; two wide
    lora = 2 * tokens * lora_rank * (6 * 2 * dim + 2 * (dim + wide))
    return {
        "linear": layers * linear,
        "attention": layers * 4 * round(tokens * keys) * dim,
        "text": layers * 4 * tokens * model.text_length * dim,
        "lora": layers * lora,
    }


def pass_flops(
    model: ModelConfig, tokens: int, keys: float, lora_rank: int = 0, *, graph: bool = False
) -> int:
    """Operations of one row's pass, with those of its backward and recomputation under a graph.

    Recomputation counts where all blocks recompute; what `auto` does depends on the memory.

    Backward of a frozen weight is one product (to the input), of an adapter two, of attention
    two and a half: it computes its scores again.
    """
    parts = forward_flops(model, tokens, keys, lora_rank)
    total = sum(parts.values())
    if not graph:
        return total
    backward = parts["linear"] + 2 * parts["lora"] + 2.5 * (parts["attention"] + parts["text"])
    return round(total * (2 if model.recompute is True else 1) + backward)


def training_flops(model: ModelConfig, tokens: int, pairs: int, lora_rank: int = 0) -> int:
    """Operations that a row's training step needs whatever it is computed by: a model's own.

    Forward and the two products of each one's backward (Chowdhery et al. 2022, app. B), so nothing
    is counted for scores or activations that are computed again. A frozen base, which `lora_rank`
    above 0 says, has one product in backward.

    Args:
        model: sizes.
        tokens: of the pass, clean history included.
        pairs: of a query and a key that it sees.
        lora_rank: of the adapters that train; 0: all weights do.
    """
    parts = forward_flops(model, tokens, pairs / tokens, lora_rank)
    frozen = parts["linear"] if lora_rank else 0
    return 3 * sum(parts.values()) - frozen
