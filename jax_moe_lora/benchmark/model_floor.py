"""The least time of a whole model's step: every byte in use once, or the multiplications."""

import math
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.random_model import DTYPE, Case
from jax_moe_lora.models.cache import init_cache
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import Layer, ModelConfig, layer_parameters, sizes_of_attention


def floor_s(case: Case, config: ModelConfig, bank: AdapterBank | None, ceilings: Ceilings) -> float:
    """The least time that the ceilings allow for a case.

    That is reading the weights, pages and caches in use once, or the multiplications, whichever takes longer. The
    number of experts and pages in use is the expected one under uniform routing. Of attention that keeps a state and
    no keys (delta-net), the multiplications within a chunk are left out.

    Args:
      case: what is timed.
      config: the model.
      bank: the adapters; None for a case without.
      ceilings: the device's limits.

    Returns:
      Seconds.
    """
    size = jnp.dtype(DTYPE).itemsize
    head = config.vocab_size * config.hidden_size
    moved, multiplied = _cache_bytes(case, config) + size * head, float(case.batch * head)
    for layer, count in Counter(config.layers).items():
        read, rows = _weights(layer, config, case.rows)
        moved += count * size * read
        multiplied += count * (case.rows * rows + _attention(layer, case))
    for read, rows in _pages(case, config, bank):
        moved += size * read
        multiplied += rows
    return max(moved / ceilings.bytes_per_s, 2 * multiplied / ceilings.flop_per_s)


def _cache_bytes(case: Case, config: ModelConfig) -> float:
    """What a decode step reads of the caches, or a prefill writes: of windows the window, of states all."""
    layers = jax.eval_shape(lambda: init_cache(config, case.batch, case.length, DTYPE).layers)
    return float(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers)))


def _weights(layer: Layer, config: ModelConfig, rows: int) -> tuple[float, float]:
    """Elements of a layer's matrices that are read, and multiplications a row."""
    table = [row for row in layer_parameters(layer, config.hidden_size) if row.projection]
    dense = float(sum(math.prod(row.shape) for row in table if not row.experts))
    if not isinstance(layer.mlp, RoutedMLP):
        return dense, dense
    moe = layer.mlp.moe
    experts = sum(math.prod(row.shape) for row in table if row.experts)
    met = 1 - (1 - moe.top_k / moe.num_experts) ** rows  # share of the experts in use
    return dense + met * experts, dense + experts * moe.top_k / moe.num_experts


def _attention(layer: Layer, case: Case) -> float:
    """Multiplications of scores and of values, of all requests."""
    attention = sizes_of_attention(layer)
    seen = float(case.length)
    if isinstance(attention, GQA):
        width = 2 * attention.num_heads * attention.head_dim
        seen = min(seen, attention.window or seen)
    elif isinstance(attention, MLA):
        width = attention.num_heads * (attention.nope_dim + attention.rope_dim + attention.value_dim)
    else:
        return 0.0
    if case.kind == "decode":
        return case.batch * seen * width
    return case.batch * (case.length * seen - seen * seen / 2) * width  # the first `seen` tokens see half on average


def _pages(case: Case, config: ModelConfig, bank: AdapterBank | None) -> Iterator[tuple[float, float]]:
    """Elements of pages that are read, and multiplications, of each module."""
    if bank is None:
        return
    rows = case.rows / (bank.num_slots + 1)  # of each adapter; as many are base rows
    for _, site in bank.sites:
        # Of an expert for a row.
        chance = min(1.0, config.moe.top_k / site.num_experts) if site.num_experts > 1 else 1.0
        matrix = len(site.layers) * bank.num_slots * bank.max_rank * (site.in_width + site.out_width)
        met = 1 - (1 - chance) ** rows if chance < 1 else min(1.0, rows)
        yield matrix * site.num_experts * met, matrix * rows * chance * site.num_experts
