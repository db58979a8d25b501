"""The module that runs each kind of block: its `forward`, and an attention's `init_cache`.

A layer whose blocks are not arranged as `LayerSpec` says is a kind of its own, with a `forward` of the whole layer.
"""

from collections.abc import Mapping
from types import ModuleType

from jax_moe_lora.models.blocks import delta_net, gemma4_attention, gemma4_layer, gqa, mla
from jax_moe_lora.models.specs.delta_net import DeltaNet
from jax_moe_lora.models.specs.gemma4 import Gemma4Attention, Gemma4Layer
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mla import MLA

ATTENTION: Mapping[type, ModuleType] = {
    GQA: gqa,
    MLA: mla,
    DeltaNet: delta_net,
    Gemma4Attention: gemma4_attention,
}
LAYERS: Mapping[type, ModuleType] = {Gemma4Layer: gemma4_layer}
