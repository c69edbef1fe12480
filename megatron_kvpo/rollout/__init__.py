"""Sampling groups of branches and replaying them."""
