"""Flax NNX modules: they hold parameters and delegate to the pure functions.

The matrices of adapters are `LoRAParam` variables, which `nnx.grad` and `nnx.Optimizer` tell from the base weights. The
tables that find them are `LoRATable` variables, which are never trained. For Linen:
`flax.nnx.bridge.to_linen(MoELoRA, config)`.
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
from jax_moe_lora.config import CHOICE_BIAS, MoEConfig
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
    """Pages of adapter matrices: what is trained where the base weights are frozen. It is no `nnx.Param`."""


class LoRATable(nnx.Variable):
    """Where an adapter's pages lie, who owns them, and its scales: changed by `load` alone."""


class Adapters(nnx.Module):
    """An adapter bank as variables: its pages, and the tables that find them.

    Pages of float32 can be trained beside weights of 16 bits. A matrix that several experts or modules share is one
    page, so it gets the sum of their gradients. What pads a page, and the pages of no adapter, get zeros.

    Args:
      bank: the bank that it begins with.
    """

    def __init__(self, bank: AdapterBank):
        self.sites, self.widths, self.max_rank = bank.sites, bank.widths, bank.max_rank
        self.pages = nnx.Dict({str(width): LoRAParam(pool) for width, pool in bank.pages.items()})
        self.owners = nnx.Dict({str(width): LoRATable(owner) for width, owner in bank.owner.items()})
        self.tables = nnx.Dict({module: LoRATable(table) for module, table in bank.tables.items()})
        self.scales = nnx.Dict({module: LoRATable(scale) for module, scale in bank.scales.items()})

    @property
    def bank(self) -> AdapterBank:
        """The bank as it stands, for `extract` and the pure functions."""
        return AdapterBank(
            tuple(self.pages[str(width)][...] for width in self.widths),
            tuple(self.owners[str(width)][...] for width in self.widths),
            {module: self.tables[module][...] for module, _ in self.sites},
            {module: self.scales[module][...] for module, _ in self.sites},
            self.widths,
            self.sites,
            self.max_rank,
        )

    def set_bank(self, bank: AdapterBank) -> None:
        """Replaces the bank by another one of the same form.

        Raises:
          InputError: it is no bank, or has other sites, sizes or dtypes.
        """
        if not isinstance(bank, AdapterBank) or _form(bank) != _form(self.bank):
            raise InputError(f"The new bank is of type {type(bank).__name__}; expected the module's own bank, changed.")
        for width, pool, owner in zip(bank.widths, bank.pools, bank.owners, strict=True):
            self.pages[str(width)].set_value(pool)
            self.owners[str(width)].set_value(owner)
        for module, _ in bank.sites:
            self.tables[module].set_value(bank.tables[module])
            self.scales[module].set_value(bank.scales[module])


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
        with_bias = config.router in CHOICE_BIAS
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

    `nnx.grad(loss, argnums=nnx.DiffState(0, LoRAParam))` and `nnx.Optimizer(layer, tx, wrt=LoRAParam)` train the
    adapters that are loaded; the base weights stay as they are.

    Args:
      config: the layer's sizes, router and activation.
      max_adapters: S, adapters that can be loaded at once; 0 makes a layer without a bank, which refuses slots.
      max_rank: the largest rank accepted.
      adapter_memory: bytes of the bank, or None for what S adapters of `max_rank` need.
      param_dtype: of the weights.
      adapter_dtype: of the bank; None takes that of the weights. Give float32 to train beside 16-bit weights.
      implementation: as in `moe_lora`.
      rngs: of the weights.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        max_adapters: int = 0,
        max_rank: int = 64,
        adapter_memory: int | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        adapter_dtype: jax.typing.DTypeLike | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.implementation = config, implementation
        self.router = Router(config, param_dtype=param_dtype, rngs=rngs)
        self.experts = RoutedExperts(config, param_dtype=param_dtype, rngs=rngs)
        dtype = param_dtype if adapter_dtype is None else adapter_dtype
        self.adapters = _adapters(moe_sites(config), max_adapters, max_rank, adapter_memory, dtype)

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
            None if self.adapters is None else self.adapters.bank.layer(0),
            slots,
            request_lengths=request_lengths,
            request_slots=request_slots,
            router_bias=None if self.router.bias is None else self.router.bias[...],
            row_mask=row_mask,
            implementation=self.implementation,
        )


class LoRALinear(nnx.Module):
    """A dense projection `[out, in]` with an adapter per row: `lora_linear` as a module.

    Args:
      in_width: width of the rows.
      out_width: width of the result.
      max_adapters: as in `MoELoRA`; adapters call the projection `linear`.
      max_rank: as in `MoELoRA`.
      adapter_memory: as in `MoELoRA`.
      param_dtype: of the weight.
      adapter_dtype: as in `MoELoRA`.
      implementation: as in `lora_linear`.
      rngs: of the weight.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        max_adapters: int = 0,
        max_rank: int = 64,
        adapter_memory: int | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        adapter_dtype: jax.typing.DTypeLike | None = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        self.implementation = implementation
        self.weight = nnx.Param(_INIT(rngs.params(), (out_width, in_width), param_dtype))
        sites = {"linear": Site(in_width, out_width, 1, (0,))}
        dtype = param_dtype if adapter_dtype is None else adapter_dtype
        self.adapters = _adapters(sites, max_adapters, max_rank, adapter_memory, dtype)

    def __call__(self, x: Float[Array, "T in"], slots: Int[Array, "T"] | None = None) -> Float[Array, "T out"]:
        _check_slots(self.adapters, slots=slots)
        slot_of_row = token_slots(x.shape[0], from_torch("slots", slots))
        if self.adapters is None:
            return _of_dtype(lora_linear(x, self.weight[...]), x)
        pages = self.adapters.bank.layer(0)["linear"]
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
    module.adapters.set_bank(change(module.adapters.bank))


def linen_variables(bank: AdapterBank) -> dict[str, dict[str, Any]]:
    """A bank as the variables of the module that `flax.nnx.bridge.to_linen(MoELoRA, ...)` makes.

    Args:
      bank: of the same form as the module's own.

    Returns:
      The collections `LoRAParam` and `LoRATable`, to be put in place of those that `init` returned.
    """
    _, pages, tables = nnx.split(Adapters(bank), LoRAParam, LoRATable)
    states = {"LoRAParam": pages, "LoRATable": tables}
    return {name: {"adapters": nnx.to_pure_dict(state)} for name, state in states.items()}


def _of_dtype(y: Any, x: Any) -> Any:
    """The result in the dtype of the rows, which may both be tensors of torch."""
    return y.to(x.dtype) if is_torch(y) else y.astype(x.dtype)


def _check_slots(adapters: Adapters | None, **given: Array | None) -> None:
    """Refuses slots that the bank does not have; without a bank, all: the base model would be served silently."""
    for name, values in given.items():
        if adapters is None and values is not None:
            raise InputError(
                f"{name} came to a module without an adapter bank; make it with max_adapters of at least 1, "
                f"or call it without {name}."
            )
        if adapters is not None and name != "request_lengths":
            check_slots(values, adapters.bank.num_slots)


def _form(bank: AdapterBank) -> Any:
    """What one compiled program asks of every bank that it is given."""
    leaves, structure = jax.tree.flatten(bank)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _adapters(sites, max_adapters, max_rank, memory, dtype) -> Adapters | None:
    return Adapters(create_bank(sites, max_adapters, max_rank, memory, dtype)) if max_adapters else None
