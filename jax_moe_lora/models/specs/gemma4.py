"""A layer of Gemma 4: what it is made of. Its forward pass is `blocks/gemma4_layer.py`.

Every layer has a dense MLP and, beside it, routed experts. Both read the same rows, each through a norm of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.parameter import Norm, Parameter

# Block -> the path of the norm before it, or behind it.
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm_1",
    "routed_norm": "pre_feedforward_layernorm_2",
    "routed_post_norm": "post_feedforward_layernorm_2",
    "sum_post_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Gemma4Attention:
    """Grouped-query attention whose values are normed, and may be the keys before their norm.

    Attributes:
      heads: sizes, rotary embedding, window and norms.
      modules: what the names of its projections begin with: layers of other widths have other modules.
      keys_are_values: there is no `v`; the values are what `k` gives.
    """

    heads: GQA
    modules: str = ""
    keys_are_values: bool = False

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        absent = ("v", "v_bias") if self.keys_are_values else ()
        rows = [row for row in self.heads.parameters(hidden_size) if row.name not in absent]
        return [row if "norm" in row.name else replace(row, name=f"{self.modules}{row.name}") for row in rows]


@dataclass(frozen=True)
class Gemma4Layer:
    """Attention, then a dense MLP and routed experts side by side; the result is multiplied by a scalar.

    Attributes:
      attention: its attention.
      dense: the MLP that every token goes through.
      mlp: the routed experts beside it.
      norm: all norms.
    """

    attention: Gemma4Attention
    dense: DenseMLP
    mlp: RoutedMLP
    norm: Norm

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """The layer's table.

        Args:
          hidden_size: D.
        """
        experts = self.mlp.moe.num_experts
        return [
            *(row for name, path in _NORMS.items() for row in self.norm.parameters(name, hidden_size, path)),
            *self.attention.parameters(hidden_size),
            *self.dense.parameters(hidden_size),
            *self.mlp.parameters(hidden_size),
            Parameter("router_scale", (hidden_size,), ("router.scale",), ("embed",), "ones"),
            Parameter("per_expert_scale", (experts,), ("router.per_expert_scale",), ("router",), "ones"),
            Parameter("layer_scalar", (1,), ("layer_scalar",), ("scalar",), "ones"),
        ]
