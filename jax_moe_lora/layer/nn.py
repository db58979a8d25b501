"""Flax NNX modules: they hold parameters and delegate to the pure functions.

Adapters live in `LoRAParam` variables, so that `nnx.split(module, LoRAParam, ...)` takes them apart from the base
weights. For Linen: `flax.nnx.bridge.to_linen(MoELoRA, config)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.adapters.bank import AdapterBank, create_bank
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.arguments import is_torch
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.checks import check_slots
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora, routed_experts
from jax_moe_lora.layer.routing import token_slots
from jax_moe_lora.layer.torch_tensors import from_torch
from pallas_kernels.ops import Implementation
from pallas_kernels.routed_experts.weights import ExpertWeights

_INIT = nnx.initializers.normal(0.02)


class LoRAParam(nnx.Variable):
    """An adapter bank held by a module: not a base weight, and not trained with them."""


def moe_sites(config: MoEConfig) -> dict[str, Site]:
    """The projections of a single layer that adapters may target."""
    d, f, e = config.hidden_size, config.expert_width, config.num_experts
    return {"router": Site(d, e, 1, (0,))} | {
        name: Site(*widths, e, (0,)) for name, widths in {"gate": (d, f), "up": (d, f), "down": (f, d)}.items()
    }


class Router(nnx.Module):
    """The router's weight `[E, D]`."""

    def __init__(self, config: MoEConfig, *, param_dtype: jax.typing.DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.weight = nnx.Param(_INIT(rngs.params(), (config.num_experts, config.hidden_size), param_dtype))
        with_bias = config.router == "sigmoid_bias"
        self.bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32)) if with_bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        return lora_linear(x, self.weight[...])


class RoutedExperts(nnx.Module):
    """All experts of a layer: gate and up `[E, F, D]`, down `[E, D, F]`, and their biases where the config has them."""

    def __init__(self, config: MoEConfig, *, param_dtype: jax.typing.DTypeLike = jnp.float32, rngs: nnx.Rngs):
        e, d, f = config.num_experts, config.hidden_size, config.expert_width
        self.config = config
        self.gate = nnx.Param(_INIT(rngs.params(), (e, f, d), param_dtype))
        self.up = nnx.Param(_INIT(rngs.params(), (e, f, d), param_dtype))
        self.down = nnx.Param(_INIT(rngs.params(), (e, d, f), param_dtype))
        self.gate_bias, self.up_bias, self.down_bias = (
            nnx.Param(jnp.zeros((e, width), param_dtype)) if config.expert_bias else None for width in (f, f, d)
        )

    @property
    def weights(self) -> ExpertWeights:
        params = (self.gate_bias, self.up_bias, self.down_bias)
        biases = (None if param is None else param[...] for param in params)
        return ExpertWeights(self.gate[...], self.up[...], self.down[...], *biases)

    def __call__(
        self, x: Float[Array, "T D"], weights: Float[Array, "T K"], chosen: Int[Array, "T K"]
    ) -> Float[Array, "T D"]:
        return routed_experts(x, weights, chosen, self.weights, self.config)


class MoELoRA(nnx.Module):
    """Router, experts and their adapters: `moe_lora` as a module.

    Args:
      config: the layer. max_adapters, max_rank: S and the largest rank of the bank; no adapters with S = 0.
      adapter_memory: bytes of the bank, or None for what S adapters of `max_rank` need.
      param_dtype: of weights and bank. implementation: as in `moe_lora`.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        max_adapters: int = 0,
        max_rank: int = 64,
        adapter_memory: int | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.implementation = config, implementation
        self.router = Router(config, param_dtype=param_dtype, rngs=rngs)
        self.experts = RoutedExperts(config, param_dtype=param_dtype, rngs=rngs)
        self.adapters = _bank(moe_sites(config), max_adapters, max_rank, adapter_memory, param_dtype)

    def __call__(
        self,
        x: Float[Array, "T D"],
        slots: Int[Array, "T"] | None = None,
        *,
        request_lengths: Int[Array, "N"] | None = None,
        request_slots: Int[Array, "N"] | None = None,
        row_mask: Bool[Array, "T"] | None = None,
    ) -> Float[Array, "T D"]:
        _check_slots(self.adapters, slots=slots, request_lengths=request_lengths, request_slots=request_slots)
        return moe_lora(
            x,
            self.router.weight[...],
            self.experts.weights,
            self.config,
            None if self.adapters is None else self.adapters.get_value().layer(0),
            slots,
            request_lengths=request_lengths,
            request_slots=request_slots,
            router_bias=None if self.router.bias is None else self.router.bias[...],
            row_mask=row_mask,
            implementation=self.implementation,
        )


class LoRALinear(nnx.Module):
    """A dense projection `[out, in]` with an adapter a row: `lora_linear` as a module."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        max_adapters: int = 0,
        max_rank: int = 64,
        adapter_memory: int | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.implementation = implementation
        self.weight = nnx.Param(_INIT(rngs.params(), (out_width, in_width), param_dtype))
        sites = {"linear": Site(in_width, out_width, 1, (0,))}
        self.adapters = _bank(sites, max_adapters, max_rank, adapter_memory, param_dtype)

    def __call__(self, x: Float[Array, "T in"], slots: Int[Array, "T"] | None = None) -> Float[Array, "T out"]:
        _check_slots(self.adapters, slots=slots)
        slot_of_row = token_slots(x.shape[0], from_torch("slots", slots))
        if self.adapters is None:
            return _of_dtype(lora_linear(x, self.weight[...]), x)
        pages = self.adapters.get_value().layer(0)["linear"]
        plan = dense_plan(slot_of_row, pages.scale.shape[0])
        return _of_dtype(lora_linear(x, self.weight[...], None, pages, plan, self.implementation), x)


def load(module: "MoELoRA | LoRALinear", change: Callable[[AdapterBank], AdapterBank]) -> None:
    """Replaces a module's bank: `load(layer, lambda bank: insert(bank, 0, adapter))`.

    Args:
      module: the module.
      change: what makes the new bank of the old one.

    Raises:
      InputError: the module has no bank, or `change` returns something else than a bank of the same form.
    """
    if module.adapters is None:
        raise InputError("This module has no adapter bank; make it with max_adapters of at least 1.")
    bank = module.adapters.get_value()
    new = change(bank)
    if not isinstance(new, AdapterBank) or (new.sites, new.max_rank) != (bank.sites, bank.max_rank):
        raise InputError(f"change returned a {type(new).__name__}; expected the module's own bank, changed.")
    module.adapters.set_value(new)


def _of_dtype(y: Any, x: Any) -> Any:
    """The result in the dtype of the rows, which may both be tensors of torch."""
    return y.to(x.dtype) if is_torch(y) else y.astype(x.dtype)


def _check_slots(bank: LoRAParam | None, **given: Array | None) -> None:
    """Refuses slots that the bank does not have; without a bank, all: the base model would be served silently."""
    for name, values in given.items():
        if bank is None and values is not None:
            raise InputError(
                f"{name} came to a module without an adapter bank; make it with max_adapters of at least 1, "
                f"or call it without {name}."
            )
        if bank is not None and name != "request_lengths":
            check_slots(values, bank.get_value().num_slots)


def _bank(sites, max_adapters, max_rank, memory, dtype) -> LoRAParam | None:
    return LoRAParam(create_bank(sites, max_adapters, max_rank, memory, dtype)) if max_adapters else None
