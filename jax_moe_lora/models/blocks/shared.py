"""The module that runs each kind of MLP that may stand beside routed experts: its `forward`."""

from collections.abc import Mapping
from types import ModuleType

from jax_moe_lora.models.blocks import dense_mlp, fused_mlp
from jax_moe_lora.models.specs.fused_mlp import FusedMLP
from jax_moe_lora.models.specs.mlp import DenseMLP

SHARED: Mapping[type, ModuleType] = {DenseMLP: dense_mlp, FusedMLP: fused_mlp}
