"""From a router's scores to each token's experts and their weights: what the kernel is told, and what it can do."""

from typing import Protocol, runtime_checkable

from pallas_kernels.portable.limits import LANES

MAX_EXPERTS = 512  # whose scores a warp holds in registers
KINDS = ("softmax_topk", "topk_softmax", "sigmoid_bias", "softmax_bias")


@runtime_checkable
class Router(Protocol):
    """How experts are chosen and weighted: the fields of `jax_moe_lora.MoEConfig` of the same names."""

    @property
    def router(self) -> str: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def top_groups(self) -> int: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def renormalize_eps(self) -> float: ...
    @property
    def renormalize_floor(self) -> float: ...
    @property
    def scaling(self) -> float: ...


def kernel_runs(router: Router) -> bool:
    """Whether the kernel serves a router: one without groups of experts, whose experts fill the lanes of a warp."""
    fits = router.num_experts % LANES == 0 and router.num_experts <= MAX_EXPERTS
    return fits and router.router in KINDS and router.num_groups == router.top_groups
