"""Compiles the routed layer for an H200 on a machine without one; prints the memory it takes.

`compile_memory.py ADAPTERS..`, names of `specs.ADAPTERS`: a line of JSON each.

Runs in the environment of `compile_kernels.py`. XLA places every array when it compiles: no run is needed to know them.
"""

import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.pages import RANK_PAGE, LayerPages, Place
from pallas_kernels.routed_experts.weights import ExpertWeights
from pallas_kernels.specs import ADAPTERS, LAYERS
from support.compile_kernels import array, target  # sets the environment before jax is imported

DTYPE, TOKENS = "bfloat16", 8192


def layer_pages(experts: int, hidden: int, inner: int, name: str) -> LayerPages | None:
    """A full bank's pages of per-expert adapters, as shapes."""
    spec = ADAPTERS[name]
    if not spec.slots:
        return None
    count = 1 + 3 * experts * sum(-(-rank // RANK_PAGE) for rank in spec.ranks * (spec.slots // len(spec.ranks)))
    return LayerPages(
        {str(width): array((count, RANK_PAGE, width), DTYPE) for width in (hidden, inner)},
        {module: array((spec.slots, experts, 4)) for module in EXPERT_MODULES},
        {module: array((spec.slots, experts), "float32") for module in EXPERT_MODULES},
        tuple(
            Place(module, *map(str, (inner, hidden) if module == "down" else (hidden, inner)))
            for module in EXPERT_MODULES
        ),
        max(spec.ranks),
    )


def main() -> None:
    device = topologies.get_topology_desc(platform="cuda", target_config=target("h200"), topology="1x1x1").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    size = LAYERS["qwen3-30b-a3b"]
    e, d, f, k = size.num_experts, size.hidden_size, size.expert_width, size.top_k
    config = MoEConfig(d, f, e, k)

    def layer(x, weights, chosen, slots, experts, adapters):
        return routed_experts(x, weights, chosen, experts, config, adapters, slots, "hopper")

    for name in sys.argv[1:]:
        tokens = array((TOKENS, d), DTYPE), array((TOKENS, k), "float32"), array((TOKENS, k)), array((TOKENS,))
        experts = ExpertWeights(array((e, f, d), DTYPE), array((e, f, d), DTYPE), array((e, d, f), DTYPE))
        arguments = (*tokens, experts, layer_pages(e, d, f, name))
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        with jax.default_device(device):
            memory = jax.jit(layer).lower(*placed).compile().memory_analysis()
        item = jnp.dtype(DTYPE).itemsize
        rows, activation = TOKENS * k * d * item, TOKENS * k * f * item
        line = {"adapters": name, "temp": memory.temp_size_in_bytes, "rows": rows, "activation": activation}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
