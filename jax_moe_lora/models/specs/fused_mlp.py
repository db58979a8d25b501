"""A gated MLP whose gate and up are one projection: what it is made of. Its forward pass is `blocks/fused_mlp.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax_moe_lora.models.specs.parameter import Parameter, projection
from pallas_kernels.constants import Activation


@dataclass(frozen=True)
class FusedMLP:
    """A shared expert with one projection into it, whose rows are all of gate and then all of up (Granite).

    Attributes:
      width: its inner width.
      activation: of the gated unit.
    """

    width: int
    activation: Activation = "silu"

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        return [
            projection("shared_in", 2 * self.width, hidden_size, "shared_mlp.input_linear", ("whole_mlp", "embed")),
            projection("shared_out", hidden_size, self.width, "shared_mlp.output_linear", ("embed", "whole_mlp")),
        ]
