"""What a step does: the question that a prediction answers."""

from dataclasses import dataclass
from typing import Literal

from jax_moe_lora.errors import InputError
from jax_moe_lora.mesh.scaling.costs import DTYPE, Step
from pallas_kernels.quantised.format import FORMATS


@dataclass(frozen=True)
class Workload(Step):
    """What a step does, all devices together.

    Attributes:
      positions: of the cache of each request; 0 for as many as the step needs.
      adapters: loaded adapters, each request with one of them; 0 for the base model.
      rank: of each.
      targets: what they are on: `experts`, or `all` projections of the layers.
      shared: the experts share the matrices on the hidden width (the shared-outer layout).
      weights: `bfloat16`, or a format of `pallas_kernels.ops.quantise`.
    """

    kind: Literal["decode", "prefill"] = "decode"
    batch: int = 8
    length: int = 512
    positions: int = 0
    adapters: int = 0
    rank: int = 16
    targets: Literal["experts", "all"] = "experts"
    shared: bool = False
    weights: str = DTYPE

    def __post_init__(self):
        for name, least in (("batch", 1), ("length", 1), ("positions", 0), ("adapters", 0), ("rank", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"{name} is {value}; expected at least {least}.")
        for name, known in (
            ("kind", ("decode", "prefill")),
            ("targets", ("experts", "all")),
            ("weights", (DTYPE, *FORMATS)),
        ):
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        if self.positions and self.positions < self.needed:
            raise InputError(f"positions are {self.positions}; this step needs {self.needed} for each request.")

    @property
    def needed(self) -> int:
        """Positions that a request has after the step."""
        return self.length + (self.kind == "decode")
