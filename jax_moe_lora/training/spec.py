"""What an adapter trains: rank, scale, layout and the projections that it targets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jax_moe_lora.adapters.formats.config_fields import MAX_ALPHA
from jax_moe_lora.adapters.lora import EXPERT_MODULES, SHARED_OUTER, SIDES, Side, Site
from jax_moe_lora.adapters.writing import LAYOUTS
from jax_moe_lora.arguments import number, whole
from jax_moe_lora.errors import InputError

Layout = Literal["fused", "per-expert", "shared-outer"]
Init = Literal["kaiming", "gaussian"]
# The name by which `write_adapter` knows a layout.
WRITTEN_AS: dict[Layout, str] = {"fused": "peft", "per-expert": "peft-per-expert", "shared-outer": "tinker"}


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter to train.

    Attributes:
      rank: R of every module that `ranks` does not name; at most the larger of a module's two widths.
      alpha: the update is scaled by alpha / R; None is twice `rank`.
      layout: of the routed experts. `fused` is PEFT's 3-D parameters: gate and up of an expert share one A. With
        `per-expert`, each expert has an A and a B for each module. `shared-outer` is Tinker's: all experts share A of
        gate, A of up and B of down.
      targets: module names of the model's sites, such as `gate`, `up`, `down`, `router`, `q`, `mlp_up`.
      rank_stabilised: scale by alpha / sqrt(R).
      init: of A; B starts at zero. `kaiming`, PEFT's default, is uniform within 1 / sqrt(in); `gaussian` is normal with
        standard deviation 1 / R.
      ranks: (module, rank) of the modules with another rank.
    """

    rank: int = 16
    alpha: float | None = None
    layout: Layout = "fused"
    targets: tuple[str, ...] = EXPERT_MODULES
    rank_stabilised: bool = False
    init: Init = "kaiming"
    ranks: tuple[tuple[str, int], ...] = ()

    def rank_of(self, module: str) -> int:
        """R of a module."""
        return dict(self.ranks).get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's update."""
        rank, alpha = self.rank_of(module), 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    @property
    def max_rank(self) -> int:
        """The largest R of any module."""
        return max(self.rank_of(module) for module in self.targets)

    def matrix(self, module: str, side: Side) -> str:
        """The name of a module's A or B; modules that share a matrix have the same name for it."""
        aliased = (
            self.layout == "fused" and side == "a" and module in ("gate", "up") and {"gate", "up"} <= {*self.targets}
        )
        return f"{'gate_up' if aliased else module}.{side}"

    def shape(self, module: str, side: Side, site: Site) -> tuple[int, int, int]:
        """`[E or 1, R, in]` for A, `[E or 1, R, out]` for B: ranks are rows, as in pages."""
        shared = self.layout == "shared-outer" and SHARED_OUTER.get(module) == side
        experts, rank = 1 if shared else site.num_experts, self.rank_of(module)
        return experts, rank, site.in_width if side == "a" else site.out_width

    def shapes(self, sites: Mapping[str, Site]) -> dict[str, tuple[int, int, int]]:
        """The shape of every matrix by its key `{layer}.{matrix}.{side}`, such as `0.gate_up.a` or `2.q.b`."""
        places = self.matrices(sites)
        return {key: self.shape(module, side, sites[module]) for key, (module, side) in places.items()}

    def matrices(self, sites: Mapping[str, Site]) -> dict[str, tuple[str, Side]]:
        """A module and side of every matrix by its key; one that modules share is there once."""
        layers = sorted({layer for module in self.targets for layer in sites[module].layers})
        return {
            f"{layer}.{self.matrix(module, side)}": (module, side)
            for layer in layers
            for module in self.targets
            if layer in sites[module].layers
            for side in SIDES
        }

    def check(self, name: str, sites: Mapping[str, Site]) -> None:
        """Refuses what the model cannot train.

        Args:
          name: the adapter's, for errors.
          sites: the model's.

        Raises:
          InputError: the adapter, the field and what was expected.
        """
        whose = f"of adapter {name!r}"
        for field, kinds in (("layout", Layout), ("init", Init)):
            if getattr(self, field) not in get_args(kinds):
                raise InputError(
                    f"{field} {whose} is {getattr(self, field)!r}; expected one of {', '.join(get_args(kinds))}."
                )
        whole(f"rank {whose}", self.rank, 1)
        if self.alpha is not None:
            expected = f"a number above zero, {MAX_ALPHA:g} at most"
            number(f"alpha {whose}", self.alpha, lambda alpha: 0 < alpha <= MAX_ALPHA, expected)
        self._check_targets(whose, sites)
        if isinstance(self.ranks, str | Mapping) or not all(
            isinstance(pair, tuple | list) and len(pair) == 2 for pair in self.ranks
        ):
            raise InputError(f"ranks {whose} are {self.ranks!r}; expected pairs such as (('gate', 8), ('up', 8)).")
        for module, rank in self.ranks:
            if module not in self.targets:
                raise InputError(
                    f"ranks {whose} name {module!r}, which is none of its targets {', '.join(self.targets)}."
                )
            whole(f"rank of {module} {whose}", rank, 1)
        for module in self.targets:
            width = max(sites[module].in_width, sites[module].out_width)
            if (rank := self.rank_of(module)) > width:
                raise InputError(f"rank of {module} {whose} is {rank}; expected at most {width}, its larger width.")
        if self.matrix("gate", "a") == self.matrix("up", "a") and self.rank_of("gate") != self.rank_of("up"):
            raise InputError(
                f"ranks {whose} are {self.rank_of('gate')} for gate and {self.rank_of('up')} for up, which share one A "
                "in the fused layout; give both one rank, or use the per-expert layout."
            )

    def _check_targets(self, whose: str, sites: Mapping[str, Site]) -> None:
        if isinstance(self.targets, str):
            raise InputError(f"targets {whose} are the text {self.targets!r}; expected a tuple of module names.")
        if not self.targets:
            raise InputError(f"targets {whose} are empty; expected some of {', '.join(sites)}.")
        for module in self.targets:
            if module not in sites:
                raise InputError(
                    f"targets {whose} name {module!r}, which this model lacks; expected {', '.join(sites)}."
                )
        if len({*self.targets}) < len(self.targets):
            raise InputError(f"targets {whose} name a module twice: {', '.join(self.targets)}.")


def check_layout(write_as: str | None) -> None:
    """Refuses a format that `write_adapter` does not write, before any work is done."""
    if write_as is not None and write_as not in LAYOUTS:
        raise InputError(f"write_as is {write_as!r}; expected one of {', '.join(LAYOUTS)}.")


def written_as(layout: Layout, write_as: str | None) -> dict[str, Any]:
    """The arguments `layout` and `expand` of `write_adapter`.

    Args:
      layout: a spec's.
      write_as: a format of `write_adapter`, which may write copies of shared matrices; None is the layout's own.

    Raises:
      InputError: a format that `write_adapter` does not write.
    """
    check_layout(write_as)
    return {"layout": write_as or WRITTEN_AS[layout], "expand": write_as not in (None, WRITTEN_AS[layout])}
