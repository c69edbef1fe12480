"""The causal video transformer, its pages of keys and values, adapters and frozen parts."""
