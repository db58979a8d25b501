"""Numbers and names that files, banks and kernels agree on; without jax."""

from typing import Literal

BASE_SLOT = -1  # of a token without an adapter
RANK_PAGE = 16  # ranks of one page
Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]  # of the gated unit; their functions: activations.py
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0  # of clamped_swiglu
