"""Where a family's projections stand in adapter files."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterNames:
    """Paths below `model.layers.L.` and the modules that they mean.

    Attributes:
      dense: path -> module, for projections with one matrix (the router among them). A module may have two paths, of
        which the last is the one in checkpoints.
      experts: last part of an expert's path -> module, as in `mlp.experts.E.gate_proj`.
      experts_path: path of the experts; their fused 3-D parameters are `gate_up_proj` and `down_proj` below it.
      per_expert_path: path of the experts where each has its own 2-D matrices; `experts_path` where None.
    """

    dense: Mapping[str, str]
    experts: Mapping[str, str]
    experts_path: str
    per_expert_path: str | None = None
