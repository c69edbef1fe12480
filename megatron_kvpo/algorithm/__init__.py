"""The KVPO arithmetic: pure functions of tensors; no ranks, no Megatron."""
