"""What the layer's functions ask of their arguments.

Every check but `check_slots` reads shapes and dtypes alone. So bad input raises before anything is traced, under `jit`
as outside of it, and a check costs nothing when the compiled program runs.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_moe_lora.arguments import host_array, is_torch, one_of, whole
from jax_moe_lora.config import GroupScore, MoEConfig
from jax_moe_lora.errors import InputError
from pallas_kernels.ops import BASE_SLOT
from pallas_kernels.pages import RANK_PAGE, LayerPages, LoRAPages
from pallas_kernels.quantised import api as quantised
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.routed_experts.weights import ExpertWeights

Kind = Literal["floating point", "integers", "booleans"]
_KINDS = {"floating point": jnp.floating, "integers": jnp.integer, "booleans": jnp.bool_}

MODULES = (
    *("router", "gate", "up", "down"),
    *("q", "k", "v", "o", "attention_gate", "global_q", "global_k", "global_v", "global_o"),
    *("q_a", "q_b", "kv_a_with_mqa", "kv_b"),
    *("delta_qkvz", "delta_ba", "delta_qkv", "delta_z", "delta_b", "delta_a", "delta_out"),
    *("mlp_gate", "mlp_up", "mlp_down"),
    *("shared_gate", "shared_up", "shared_down", "shared_in", "shared_out", "shared_expert_gate"),
)
"""Every module that one layer's adapters may have: the routed layer's own, and those beside it in a decoder layer."""


def check_array(name: str, value: Any, shape: Sequence[int | str], kind: Kind) -> None:
    """Refuses what is no array of this shape and kind.

    Args:
      name: what errors call the array.
      value: an array of jax or numpy, traced or not.
      shape: its sizes; a string stands for any size.
      kind: what its elements are.

    Raises:
      InputError: it is another thing.
    """
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"{name} is of type {type(value).__name__}; expected an array {_shown(shape)}.")
    if is_torch(value):
        raise InputError(f"{name} is a torch tensor; expected an array, which jax.numpy.from_dlpack makes of it.")
    if not jnp.issubdtype(value.dtype, _KINDS[kind]):
        raise InputError(f"{name} has dtype {value.dtype}; expected {kind}.")
    if not _fits(value.shape, shape):
        raise InputError(f"{name} has shape {list(value.shape)}; expected {_shown(shape)}.")


def check_weight(name: str, value: Any, shape: Sequence[int | str]) -> None:
    """Refuses what is no weight of this shape: an array of floating point, or a quantised one.

    Args:
      name: what errors call the weight.
      value: an array, or a `Quantised`.
      shape: its sizes; a string stands for any size.

    Raises:
      InputError: it is another thing.
    """
    if not isinstance(value, Quantised):
        return check_array(name, value, shape, "floating point")
    if not _fits(value.shape, shape):
        raise InputError(f"{name} is {value.format.name} of shape {list(value.shape)}; expected {_shown(shape)}.")
    quantised.check(name, value)


def check_slots(slots: Any, num_slots: int) -> None:
    """Refuses slots that a bank does not have, where their values are known: inside `jit` such a row is a base row.

    An array on a device is copied to the host the first time that it is checked; jax keeps the copy.

    Args:
      slots: integers of any shape, traced or not; None is accepted.
      num_slots: S.

    Raises:
      InputError: the first slot that is out of range.
    """
    if slots is None or isinstance(slots, jax.core.Tracer):
        return
    values = host_array(slots)
    if values.dtype.kind not in "iu":
        return  # refused by name where it is used
    bad = values[(values < BASE_SLOT) | (values >= num_slots)]
    if bad.size:
        has = f"-1 (the base model) to {num_slots - 1}" if num_slots else "-1 (the base model) alone, without a bank"
        raise InputError(f"slots has {bad.flat[0]}; expected {has}.")


def check_layer_input(x: Any, config: MoEConfig) -> int:
    """Checks rows, and the number of experts that each goes to; returns T."""
    whole("config.top_k", config.top_k, 1)
    check_array("x", x, ("T", config.hidden_size), "floating point")
    return x.shape[0]


def check_router(router: Any, scores: Any, tokens: int, config: MoEConfig) -> None:
    """Exactly one of the router's weight and its scores, of the config's sizes."""
    if (router is None) == (scores is None):
        came = "neither router nor scores" if router is None else "router together with scores"
        raise InputError(f"moe_lora got {came}; give the router's weight, or None and the scores that it gave.")
    if router is not None:
        check_weight("router", router, (config.num_experts, config.hidden_size))
    else:
        check_scores(scores, tokens, config)


def check_groups(config: MoEConfig) -> None:
    """The groups of experts, and how many of them a token chooses from.

    Args:
      config: the layer's.

    Raises:
      InputError: groups of unequal sizes, too few experts in those that are kept, or an unknown score.
    """
    groups = whole("config.num_groups", config.num_groups, 1, config.num_experts)
    kept = whole("config.top_groups", config.top_groups, 1, groups)
    size, rest = divmod(config.num_experts, groups)
    if rest:
        raise InputError(f"config.num_groups is {groups}; expected a divisor of the {config.num_experts} experts.")
    if kept * size < config.top_k:
        raise InputError(
            f"config.top_groups is {kept}, groups of {size} experts each; expected room for top_k = {config.top_k}."
        )
    score = one_of("config.group_score", config.group_score, get_args(GroupScore))
    if score == "top2_sum" and kept < groups and size < 2:
        raise InputError("config.group_score is 'top2_sum', of groups of one expert; expected two or more in each.")


def check_scores(scores: Any, tokens: int | str, config: MoEConfig) -> None:
    """The router's scores, one per expert."""
    check_array("scores", scores, (tokens, config.num_experts), "floating point")


def check_router_bias(bias: Any, config: MoEConfig) -> None:
    """The router's bias, one value per expert, where there is one."""
    if bias is not None:
        check_array("router_bias", bias, (config.num_experts,), "floating point")


def check_row_mask(row_mask: Any, tokens: int) -> None:
    """A boolean per row, where there is a mask."""
    if row_mask is not None:
        check_array("row_mask", row_mask, (tokens,), "booleans")


def check_choice(weights: Any, chosen: Any, tokens: int, config: MoEConfig) -> None:
    """The router's weights and expert ids."""
    check_array("weights", weights, (tokens, config.top_k), "floating point")
    check_array("chosen", chosen, (tokens, config.top_k), "integers")


def check_experts(experts: Any, config: MoEConfig) -> None:
    """Matrices, and the biases that there are."""
    if not isinstance(experts, ExpertWeights):
        raise InputError(f"experts are of type {type(experts).__name__}; expected ExpertWeights.")
    e, d, f = config.num_experts, config.hidden_size, config.expert_width
    for name, shape in {"gate": (e, f, d), "up": (e, f, d), "down": (e, d, f)}.items():
        check_weight(name, getattr(experts, name), shape)
    for name, width in {"gate_bias": f, "up_bias": f, "down_bias": d}.items():
        if getattr(experts, name) is not None:
            check_array(name, getattr(experts, name), (e, width), "floating point")


def check_biases(experts: ExpertWeights, config: MoEConfig) -> None:
    """The experts have biases where the config says so, and nowhere else."""
    for name in ("gate_bias", "up_bias", "down_bias"):
        bias = getattr(experts, name)
        if config.expert_bias and bias is None:
            raise InputError(f"{name} is missing; the config says that experts have biases.")
        if not config.expert_bias and bias is not None:
            raise InputError(f"{name} has shape {list(bias.shape)}; the config says that experts have no biases.")


def module_names(adapters: LayerPages | None) -> tuple[str, ...]:
    """The modules that one layer's adapters have."""
    if adapters is None:
        return ()
    if not isinstance(adapters, LayerPages):
        came = type(adapters).__name__
        raise InputError(f"adapters are of type {came}; expected those of one layer, from `bank.layer(index)`.")
    return adapters.modules


def check_adapters(adapters: LayerPages | None, config: MoEConfig) -> None:
    """One layer's adapters: known modules, and of the routed layer's own pages that fit it."""
    names = module_names(adapters)
    for name in names:
        if name not in MODULES:
            raise InputError(f"adapters have a module {name!r}; expected some of {', '.join(MODULES)}.")
    e, d, f = config.num_experts, config.hidden_size, config.expert_width
    sizes = {"router": (d, e, 1), "gate": (d, f, e), "up": (d, f, e), "down": (f, d, e)}
    slots: dict[str, int] = {}
    for name in names:
        if adapters is not None and name in sizes:
            slots[name] = check_pages(f"adapters[{name!r}]", adapters[name], *sizes[name])
    if len({*slots.values()}) > 1:
        raise InputError(f"adapters have numbers of slots that differ: {slots}; take all from one bank.")


def check_pages(name: str, pages: Any, in_width: int, out_width: int, num_experts: int) -> int:
    """Refuses pages that are not of this projection.

    Args:
      name: what errors call the pages.
      pages: `LoRAPages`, or what came in their place.
      in_width: of the projection's rows.
      out_width: of its result.
      num_experts: E; 1 for a dense projection.

    Returns:
      S, the number of slots.

    Raises:
      InputError: they are another thing, or of other shapes.
    """
    if not isinstance(pages, LoRAPages):
        raise InputError(f"{name} is of type {type(pages).__name__}; expected LoRAPages.")
    check_array(f"{name}.a", pages.a, ("N", RANK_PAGE, in_width), "floating point")
    check_array(f"{name}.b", pages.b, ("N", RANK_PAGE, out_width), "floating point")
    check_array(f"{name}.table", pages.table, ("S", num_experts, 4), "integers")
    check_array(f"{name}.scale", pages.scale, (pages.table.shape[0], num_experts), "floating point")
    return pages.table.shape[0]


def check_linear(x: Any, weight: Any, bias: Any) -> None:
    """A dense projection and its rows."""
    check_weight("weight", weight, ("out", "in"))
    check_array("x", x, ("T", weight.shape[1]), "floating point")
    if bias is not None:
        check_array("bias", bias, weight.shape[:1], "floating point")


def check_dense_plan(plan_slots: Array, planned_slots: int, tokens: int, num_slots: int) -> None:
    """The plan of a dense projection is of its rows and of its bank.

    Args:
      plan_slots: `[T]`, the plan's slots.
      planned_slots: S that the plan was made for.
      tokens: rows of x.
      num_slots: S of the pages.

    Raises:
      InputError: it is another plan.
    """
    check_array("plan.slots", plan_slots, (tokens,), "integers")
    if planned_slots != num_slots:
        raise InputError(
            f"The plan was made for {planned_slots} slots, the pages have {num_slots}; "
            f"make it by dense_plan(slots, {num_slots})."
        )


def _fits(shape: Sequence[int], expected: Sequence[int | str]) -> bool:
    return len(shape) == len(expected) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(shape, expected, strict=True)
    )


def _shown(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
