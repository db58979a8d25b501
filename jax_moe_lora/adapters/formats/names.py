"""Where a family's projections stand in adapter files."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterNames:
    """Paths below `model.layers.L.` and the modules that they mean.

    Attributes:
      dense: path -> module, for projections with one matrix (the router among them).
      experts: last part of an expert's path -> module, as in `mlp.experts.E.gate_proj`.
      experts_path: path of the experts; their fused 3-D parameters are `gate_up_proj` and `down_proj` below it.
    """

    dense: Mapping[str, str]
    experts: Mapping[str, str]
    experts_path: str
