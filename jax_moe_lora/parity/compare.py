"""The layer beside the torch reference: every probe, in every dtype."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_moe_lora.adapters.bank import AdapterBank, create_bank
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import EXPERT_MODULES, LoRAAdapter
from jax_moe_lora.arguments import sequence, whole
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.moe import routed_experts
from jax_moe_lora.layer.nn import moe_sites
from jax_moe_lora.parity.adapters import for_reference, widths
from jax_moe_lora.parity.difference import Difference, difference
from jax_moe_lora.parity.probe import Probe, probes
from jax_moe_lora.parity.reference import torch_reference
from pallas_kernels.ops import Implementation
from pallas_kernels.routed_experts.weights import ExpertWeights

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""dtype -> the relative Frobenius error that its rounding explains, on inputs that the dtype represents exactly."""
_NUMPY = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_LAYER = jax.jit(routed_experts, static_argnames=("config", "implementation"))


@dataclass(frozen=True)
class LayerInputs:
    """What a layer reads beside its adapters, as float32 numpy arrays.

    Attributes:
      x: `[T, D]`.
      chosen: int32 `[T, K]`, the top-k expert ids.
      weights: `[T, K]`, the router's scores of these experts; they sum to one.
      experts: `gate` and `up` as `[E, F, D]`, `down` as `[E, D, F]`.
    """

    x: np.ndarray
    chosen: np.ndarray
    weights: np.ndarray
    experts: dict[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """One probe in one dtype.

    Attributes:
      probe: its name.
      dtype: of inputs, weights, adapters and result of the layer; the reference computes in float32.
      max_result: largest magnitude of the layer's result.
      max_reference: largest magnitude of the reference.
      difference: of the two.
      tolerance: the relative error that the dtype's rounding explains.
    """

    probe: str
    dtype: str
    max_result: float
    max_reference: float
    difference: Difference
    tolerance: float

    @property
    def within(self) -> bool:
        """Whether the relative error is within the tolerance. A NaN is not."""
        return self.difference.relative <= self.tolerance


def random_inputs(config: MoEConfig, tokens: int, seed: int = 0) -> LayerInputs:
    """Random tokens, routing and experts of a layer.

    Args:
      config: the layer's sizes.
      tokens: T.
      seed: the same seed gives the same numbers.

    Returns:
      x normal with deviation 1, the experts with `1 / sqrt(in)`; K different experts per token, drawn uniformly.

    Raises:
      InputError: a number of tokens or a seed that is no whole number, or a K above E.
    """
    whole("tokens", tokens, 1)
    whole("config.top_k", config.top_k, 1, config.num_experts)
    rng = np.random.default_rng(whole("seed", seed, 0, 2**63 - 1))
    experts = {
        module: rng.standard_normal((config.num_experts, *size), np.float32) * np.float32(size[1] ** -0.5)
        for module, size in widths(config).items()
    }
    chosen = np.argsort(rng.random((tokens, config.num_experts)), axis=1)[:, : config.top_k].astype(np.int32)
    weights = rng.dirichlet(np.ones(config.top_k), tokens).astype(np.float32)
    return LayerInputs(rng.standard_normal((tokens, config.hidden_size), np.float32), chosen, weights, experts)


def table(
    config: MoEConfig,
    tokens: int = 32,
    rank: int = 8,
    dtypes: Sequence[str] = tuple(TOLERANCE),
    *,
    seed: int = 0,
    implementation: Implementation | None = None,
    torch_device: str = "cpu",
    custom_probes: Sequence[Probe] | None = None,
) -> tuple[Comparison, ...]:
    """Compares the routed experts with the torch reference, on inputs rounded to the dtype.

    Args:
      config: the layer's sizes; its activation is `silu`, and its experts have no biases.
      tokens: T.
      rank: R of the probes' adapters.
      dtypes: some of float32, float16 and bfloat16.
      seed: of tokens, routing, experts and adapters.
      implementation: a backend of the grouped ops by name, or None for the best available.
      torch_device: where the reference computes, such as `cpu` or `cuda`.
      custom_probes: in place of `probes(config, rank, seed=seed)`.

    Returns:
      One comparison per probe and dtype, probe by probe.

    Raises:
      InputError: an unknown dtype, a layer that the reference does not define, or torch is not installed, or does not
        have the device.
      UnsupportedImplementation: the backend cannot run these sizes, in one of the dtypes.
    """
    _check_torch(torch_device)
    for dtype in sequence("dtypes", dtypes):
        if dtype not in TOLERANCE:
            raise InputError(f"dtype is {dtype!r}; expected some of {', '.join(TOLERANCE)}.")
    if config.activation != "silu" or config.expert_bias:
        raise InputError(
            f"config has the activation {config.activation!r} and expert_bias={config.expert_bias}; torch_reference "
            "defines silu without biases."
        )
    inputs = random_inputs(config, tokens, seed)
    compared = probes(config, rank, seed=seed) if custom_probes is None else tuple(custom_probes)
    by_dtype = {
        dtype: _column(config, inputs, compared, dtype, implementation, torch_device) for dtype in dict.fromkeys(dtypes)
    }
    return tuple(comparison for row in zip(*by_dtype.values(), strict=True) for comparison in row)


def _check_torch(device: str) -> None:
    if find_spec("torch") is None:
        raise InputError("The reference needs torch, which is not installed; install the `parity` extra.")
    import torch

    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).partition("\n")[0].partition(". Please")[0]
        raise InputError(f"torch cannot compute on {device!r}: {reason}; expected a device such as cpu.") from error


def _column(
    config: MoEConfig,
    inputs: LayerInputs,
    compared: Sequence[Probe],
    dtype: str,
    implementation: Implementation | None,
    torch_device: str,
) -> list[Comparison]:
    """Every probe in one dtype."""
    rounding = _Rounding(dtype)
    x, experts = rounding(inputs.x), {module: rounding(w) for module, w in inputs.experts.items()}
    layer = (jnp.asarray(x, dtype), jnp.asarray(inputs.weights), jnp.asarray(inputs.chosen))
    on_device = ExpertWeights(**{module: jnp.asarray(w, dtype) for module, w in experts.items()})
    empty = _bank(config, compared, dtype)
    comparisons = []
    for probe in compared:
        slots = probe.slots(len(x))
        adapters = [rounding.adapter(adapter) for adapter in probe.adapters]
        bank = empty
        for slot, adapter in enumerate(adapters):
            bank = insert(bank, slot, adapter)
        y = _LAYER(*layer, on_device, config, bank.layer(0), jnp.asarray(slots), implementation=implementation)
        result = np.asarray(y).astype(np.float32)
        expected = torch_reference(
            x, inputs.chosen, inputs.weights, experts, [*map(for_reference, adapters)], slots, torch_device
        )
        reference = expected.cpu().numpy()
        comparisons.append(
            Comparison(
                probe.name,
                dtype,
                float(np.abs(result).max()),
                float(np.abs(reference).max()),
                difference(result, reference),
                TOLERANCE[dtype],
            )
        )
    return comparisons


def _bank(config: MoEConfig, compared: Sequence[Probe], dtype: str) -> AdapterBank:
    """An empty bank that each probe fits, so that one program serves all of them."""
    sites = {module: site for module, site in moe_sites(config).items() if module in EXPERT_MODULES}
    slots = max((len(probe.adapters) for probe in compared), default=0)
    rank = max((adapter.max_rank for probe in compared for adapter in probe.adapters), default=0)
    return create_bank(sites, max(slots, 1), max(rank, 1), None, dtype)


class _Rounding:
    """Rounds float32 arrays to what a dtype represents; of one array always the same one, so that aliases stay."""

    def __init__(self, dtype: str):
        self.dtype = _NUMPY[dtype]
        self.kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, array: np.ndarray) -> np.ndarray:
        if id(array) not in self.kept:
            self.kept[id(array)] = array, array.astype(self.dtype, copy=False).astype(np.float32, copy=False)
        return self.kept[id(array)][1]

    def adapter(self, adapter: LoRAAdapter) -> LoRAAdapter:
        """An adapter whose matrices are rounded."""
        weights = {key: replace(w, a=self(w.a), b=self(w.b)) for key, w in adapter.weights.items()}
        return replace(adapter, weights=weights)
