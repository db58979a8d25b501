"""The least time of a whole model's step: every byte in use once, or the multiplications."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.random_model import Case
from jax_moe_lora.mesh.scaling.costs import (
    ITEMSIZE,
    ONE_DEVICE,
    Step,
    Work,
    attention_work,
    in_use,
    pages_work,
    quantised_bytes,
    weights_work,
)
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import Layer, ModelConfig, layer_parameters
from pallas_kernels.quantised.format import Format


def floor_s(
    case: Case,
    config: ModelConfig,
    bank: AdapterBank | None,
    ceilings: Ceilings,
    formats: Mapping[str, Format] = MappingProxyType({}),
) -> float:
    """The least time that the ceilings allow for a case.

    That is reading the weights, pages and caches in use once, or the multiplications, whichever takes longer. The
    number of experts and pages in use is the expected one under uniform routing. Of attention that keeps a state and
    no keys (delta-net), the multiplications within a chunk are left out.

    Args:
      case: what is timed.
      config: the model.
      bank: the adapters; None for a case without.
      ceilings: the device's limits.
      formats: of quantised weights, path -> format (`quantised.schemes.quantised_formats`); their scales are read too.

    Returns:
      Seconds.
    """
    head = config.vocab_size * config.hidden_size
    total = Work(ITEMSIZE * head, case.batch * head)
    for layer, count in config.kinds.items():
        one = weights_work(layer, config.hidden_size, case, ONE_DEVICE) + attention_work(layer, case, ONE_DEVICE)
        at = f"layers.{config.layers.index(layer)}."
        of_layer = {path.removeprefix(at): format for path, format in formats.items() if path.startswith(at)}
        total += (one + _saved(layer, config, case, of_layer)).times(count)
    if bank is not None:
        total += _pages(case, config, bank)
    return max(total.read / ceilings.bytes_per_s, 2 * total.multiplied / ceilings.flop_per_s)


def _saved(layer: Layer, config: ModelConfig, step: Step, formats: Mapping[str, Format]) -> Work:
    """The bytes that quantised weights of a layer need not be read, as a negative number."""
    routed = layer.mlp.moe if isinstance(layer.mlp, RoutedMLP) else None
    share = in_use(routed.top_k / routed.num_experts, step.rows) if routed else 1.0
    saved = 0.0
    for row in layer_parameters(layer, config.hidden_size):
        if row.name in formats:
            fewer = ITEMSIZE * math.prod(row.shape) - quantised_bytes(row.shape, formats[row.name])
            saved += fewer * (share if row.experts else 1.0)
    return Work(-saved)


def _pages(step: Step, config: ModelConfig, bank: AdapterBank) -> Work:
    """Reading pages, and the products with them: as many rows of each adapter, and of none."""
    rows = step.rows / (bank.num_slots + 1)
    total = Work()
    for module, site in bank.sites:
        chance = config.moe.top_k / config.moe.num_experts if site.num_experts > 1 else 1.0
        one = pages_work(module, site, bank.num_slots, rows, chance, bank.max_rank, shared=False)
        total += one.times(len(site.layers))
    return total
