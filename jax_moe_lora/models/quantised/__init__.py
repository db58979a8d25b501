"""Quantised checkpoints as they are published: their configs, their tensors, and reading them."""
