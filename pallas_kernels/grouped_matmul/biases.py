"""The biases of a grouped matmul, which every backend takes alike."""

from jaxtyping import Array, Float

Biases = tuple[Float[Array, "E _out"] | None, ...]
"""For each weight its bias, one row per expert, or None."""
