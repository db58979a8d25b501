"""The module that runs each kind of block: its `forward`, and an attention's `init_cache`."""

from collections.abc import Mapping
from types import ModuleType

from jax_moe_lora.models.blocks import delta_net, gqa, mla
from jax_moe_lora.models.specs.delta_net import DeltaNet
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mla import MLA

ATTENTION: Mapping[type, ModuleType] = {GQA: gqa, MLA: mla, DeltaNet: delta_net}
