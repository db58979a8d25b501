"""The least time of a whole model's step: every byte in use once, or the multiplications."""

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.random_model import Case
from jax_moe_lora.mesh.scaling.costs import (
    ITEMSIZE,
    ONE_DEVICE,
    Step,
    Work,
    attention_work,
    pages_work,
    weights_work,
)
from jax_moe_lora.models.specs.model import ModelConfig


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
    step = Step(case.kind, case.batch, case.length)
    head = config.vocab_size * config.hidden_size
    total = Work(ITEMSIZE * head, case.batch * head)
    for layer, count in config.kinds.items():
        one = weights_work(layer, config.hidden_size, step, ONE_DEVICE) + attention_work(layer, step, ONE_DEVICE)
        total += one.times(count)
    if bank is not None:
        total += _pages(step, config, bank)
    return max(total.read / ceilings.bytes_per_s, 2 * total.multiplied / ceilings.flop_per_s)


def _pages(step: Step, config: ModelConfig, bank: AdapterBank) -> Work:
    """Reading pages, and the products with them: as many rows of each adapter, and of none."""
    rows = step.rows / (bank.num_slots + 1)
    total = Work()
    for module, site in bank.sites:
        chance = config.moe.top_k / config.moe.num_experts if site.num_experts > 1 else 1.0
        one = pages_work(module, site, bank.num_slots, rows, chance, bank.max_rank, shared=False)
        total += one.times(len(site.layers))
    return total
