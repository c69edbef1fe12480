"""Online GRPO for streaming video generators, on megatron-core."""

__version__ = "0.1.0"
