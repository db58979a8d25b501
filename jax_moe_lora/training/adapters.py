"""The parameters of one adapter: initialised, taken from an adapter in memory, and turned back into one.

Params are `{layer}.{matrix}.{side}` -> float32 matrices of the shapes in `AdapterSpec.shapes`. They have no padding,
and a matrix that experts or modules share is there once. B is transposed, compared with adapter files: `[E, R, out]`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_moe_lora.adapters.lora import EXPERT_MODULES, SHARED_OUTER, SIDES, LoRAAdapter, Site, same_matrices, uniform
from jax_moe_lora.errors import InputError
from jax_moe_lora.training.spec import AdapterSpec, Layout

Params = dict[str, Float[Array, "_experts _rows _columns"]]


def init_params(spec: AdapterSpec, sites: Mapping[str, Site], key: jax.Array) -> Params:
    """The params of a new adapter, initialised as PEFT does: A random as `spec.init` says, B zero.

    Args:
      spec: what it trains.
      sites: the model's.
      key: jax's random key.
    """
    shapes = spec.shapes(sites)
    keys = jax.random.split(key, len(shapes))
    return {
        name: _init(spec, name, shape, param_key) for (name, shape), param_key in zip(shapes.items(), keys, strict=True)
    }


def _init(spec: AdapterSpec, name: str, shape: tuple[int, int, int], key: jax.Array) -> Float[Array, "E rows columns"]:
    if name.endswith(".b"):
        return jnp.zeros(shape, jnp.float32)
    _, rank, width = shape
    if spec.init == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / rank
    bound = 1 / math.sqrt(width)  # kaiming_uniform_(a=sqrt(5)) over this many inputs
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def to_adapter(
    params: Mapping[str, Array],
    spec: AdapterSpec,
    sites: Mapping[str, Site],
    name: str,
    source: Mapping[str, Any] | None = None,
) -> LoRAAdapter:
    """The adapter in host memory, for `write_adapter` (`WRITTEN_AS` has the format that corresponds to its layout).

    Args:
      params: as `init_params` makes them.
      spec: what it trains.
      sites: the model's.
      name: its name.
      source: fields for its config, such as `base_model_name_or_path`.
    """
    matrices = jax.device_get(dict(params))
    weights = {
        (layer, module): uniform(
            matrices[f"{layer}.{spec.matrix(module, 'a')}"],
            matrices[f"{layer}.{spec.matrix(module, 'b')}"].swapaxes(1, 2),
            spec.scale_of(module),
            sites[module].num_experts,
        )
        for module in spec.targets
        for layer in sites[module].layers
    }
    fields = {"task_type": "CAUSAL_LM"} | dict(source or {}) | {"use_rslora": spec.rank_stabilised}
    return LoRAAdapter(name, weights, fields)


def spec_of(adapter: LoRAAdapter, sites: Mapping[str, Site]) -> AdapterSpec:
    """The spec that describes an adapter.

    Args:
      adapter: in memory.
      sites: the model's.

    Raises:
      InputError: no spec describes it: some layers or experts lack a module, or ranks or scales differ within a module.
    """
    for layer, module in adapter.weights:
        if module not in sites:
            raise _error(adapter, layer, module, f"it cannot be trained here; what can is {', '.join(sites)}")
    ranks, scales = _one_rank_and_scale(adapter, sites)
    alpha, stabilised = _alpha(adapter, ranks, scales)
    rank = max(ranks.values(), key=list(ranks.values()).count)
    others = tuple((module, module_rank) for module, module_rank in ranks.items() if module_rank != rank)
    return AdapterSpec(rank, alpha, _layout(adapter), tuple(ranks), stabilised, ranks=others)


def from_adapter(adapter: LoRAAdapter, sites: Mapping[str, Site]) -> tuple[Params, AdapterSpec]:
    """Params of an adapter that was loaded, to train it further, and the spec that describes it.

    Args:
      adapter: in memory.
      sites: the model's.

    Raises:
      InputError: as `spec_of`; or matrices are shared in a way that no layout has.
    """
    spec = spec_of(adapter, sites)
    params: Params = {}
    for (layer, module), weights in adapter.weights.items():
        module_rank = spec.rank_of(module)
        for side in SIDES:
            matrix = weights.a[:, :module_rank] if side == "a" else weights.b[:, :, :module_rank].swapaxes(1, 2)
            expected = spec.shape(module, side, sites[module])
            if matrix.shape != expected:
                problem = f"its {side.upper()} is {list(matrix.shape)}, the {spec.layout} layout has {list(expected)}"
                raise _error(adapter, layer, module, problem)
            key = f"{layer}.{spec.matrix(module, side)}"
            if key not in params:
                params[key] = jnp.array(matrix.astype(np.float32))
    return params, spec


def _one_rank_and_scale(adapter: LoRAAdapter, sites: Mapping[str, Site]) -> tuple[dict[str, int], dict[str, float]]:
    """Module -> its rank, and its scale, which all its experts and layers must have."""
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for module in (module for module in sites if module in adapter.modules):
        for layer in sites[module].layers:
            weights = adapter.weights.get((layer, module))
            if weights is None or not weights.ranks.all():
                raise _error(adapter, layer, module, "it, or one of its experts, is missing")
            rank, scale = int(weights.ranks[0]), float(weights.scale[0])
            expected = ranks.setdefault(module, rank), scales.setdefault(module, scale)
            if (weights.ranks != expected[0]).any() or (weights.scale != np.float32(expected[1])).any():
                raise _error(adapter, layer, module, "its experts or layers have several ranks or scales")
    if not ranks:
        raise InputError(f"Adapter {adapter.name!r} targets nothing that this model has; it cannot be trained further.")
    return ranks, scales


def _alpha(adapter: LoRAAdapter, ranks: Mapping[str, int], scales: Mapping[str, float]) -> tuple[float, bool]:
    """The one alpha that gives every module its scale, and whether by the square root of its rank."""
    declared = bool(adapter.source.get("use_rslora"))
    for stabilised in (declared, not declared):
        alphas = [scales[module] * (math.sqrt(rank) if stabilised else rank) for module, rank in ranks.items()]
        if np.allclose(alphas, alphas[0], rtol=1e-6, atol=0):
            whole = float(round(alphas[0]))
            return whole if math.isclose(whole, alphas[0], rel_tol=1e-6) else alphas[0], stabilised
    listed = ", ".join(f"{module}: {scales[module]:g} at rank {rank}" for module, rank in ranks.items())
    raise InputError(
        f"Adapter {adapter.name!r} cannot be trained further: its scales ({listed}) follow from no single alpha."
    )


def _layout(adapter: LoRAAdapter) -> Layout:
    weights = {module: w for (_, module), w in adapter.weights.items()}
    if any(module in weights and len(getattr(weights[module], side)) == 1 for module, side in SHARED_OUTER.items()):
        return "shared-outer"
    both = "gate" in weights and "up" in weights
    return "per-expert" if both and not same_matrices(weights["gate"].a, weights["up"].a) else "fused"


def _error(adapter: LoRAAdapter, layer: int, module: str, problem: str) -> InputError:
    return InputError(
        f"Adapter {adapter.name!r} cannot be trained further: layer {layer}, {module}: {problem}; "
        f"train a new one, or one whose {', '.join(EXPERT_MODULES)} are of one kind."
    )
