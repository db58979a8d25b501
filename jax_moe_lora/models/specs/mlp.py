"""MLPs, dense and routed: what they are made of. Their forward passes are `blocks/dense_mlp.py` and `routed_mlp.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.specs.fused_mlp import FusedMLP
from jax_moe_lora.models.specs.parameter import Parameter, bias, expert_projection, projection
from pallas_kernels.constants import Activation


@dataclass(frozen=True)
class DenseMLP:
    """A gated MLP that every token goes through.

    Attributes:
      width: its inner width.
      activation: of the gated unit.
      modules: what its projections' names begin with.
      path: of its module below the layer.
      biases: its projections have biases (Ernie 4.5).
    """

    width: int
    activation: Activation = "silu"
    modules: str = "mlp"
    path: str = "mlp"
    biases: bool = False

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        into = [
            projection(f"{self.modules}_{part}", self.width, hidden_size, f"{self.path}.{part}_proj", ("mlp", "embed"))
            for part in ("gate", "up")
        ]
        down = projection(f"{self.modules}_down", hidden_size, self.width, f"{self.path}.down_proj", ("embed", "mlp"))
        rows = [*into, down]
        biased = rows if self.biases else []
        return [*rows, *(bias(f"{row.name}_bias", row.shape[0], row.modules[0], row.axes[0]) for row in biased)]


@dataclass(frozen=True)
class RoutedMLP:
    """Routed experts, and beside them those that every token goes through.

    Attributes:
      moe: sizes, router and activation of the routed experts.
      router_bias: the scores get a bias before anything else (gpt-oss).
      router_float32: the router's weight stays float32 (`_keep_in_fp32_modules_strict` of transformers).
      choice_bias: a float32 bias for the choice of experts alone (DeepSeek-V3).
      choice_bias_row: checkpoints hold it as `[1, E]` (Ernie 4.5).
      shared: the shared expert; several of one family are one of their joint width.
      shared_gate: the shared expert is weighted by a sigmoid gate (Qwen2-MoE).
    """

    moe: MoEConfig
    router_bias: bool = False
    router_float32: bool = False
    choice_bias: bool = False
    choice_bias_row: bool = False
    shared: DenseMLP | FusedMLP | None = None
    shared_gate: bool = False

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        d, f, e = hidden_size, self.moe.expert_width, self.moe.num_experts
        rows = [
            replace(projection("router", e, d, "mlp.gate", ("router", "embed")), float32=self.router_float32),
            expert_projection("gate", e, f, d, ("expert_mlp", "embed")),
            expert_projection("up", e, f, d, ("expert_mlp", "embed")),
            expert_projection("down", e, d, f, ("embed", "expert_mlp")),
        ]
        if self.router_bias:
            rows.append(bias("router_bias", e, "mlp.gate", "router"))
        if self.choice_bias:
            vector = Parameter(
                "choice_bias", (e,), ("mlp.gate.e_score_correction_bias",), ("router",), "zeros", float32=True
            )
            row = replace(vector, shape=(1, e), axes=("scalar", "router"))
            rows.append(row if self.choice_bias_row else vector)
        if self.moe.expert_bias:
            widths = {"gate": f, "up": f, "down": d}
            rows += [
                Parameter(f"{part}_bias", (e, width), (f"{part}_proj.bias",), row.axes[:2], "zeros", experts=True)
                for (part, width), row in zip(widths.items(), rows[1:4], strict=True)
            ]
        if self.shared is not None:
            rows += self.shared.parameters(d)
        if self.shared_gate:
            rows.append(projection("shared_expert_gate", 1, d, "mlp.shared_expert_gate", ("scalar", "embed")))
        return rows
