"""Compiles decode steps of Qwen3-30B-A3B's width for an H200 on a machine without one; prints a line of JSON each.

Runs in the environment of `compile_kernels.py`. Without cuDNN, attention is XLA's; on a GPU see test_gpu_model.py.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from jax.experimental import topologies

from jax_moe_lora.benchmark.model import lower_case
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.benchmark.random_model import Case, make_bank
from support.compile_kernels import target  # sets the environment before jax is imported
from support.thunks import dump_options, read_thunks


def main() -> None:
    device = topologies.get_topology_desc(platform="cuda", target_config=target("h200"), topology="1x1x1").devices[0]
    config = model_config("qwen3-30b-a3b", 2)
    for adapters, targets in (("s8r16", "experts"), ("s8r64", "all")):
        case = Case("decode", 8, 512, 1024, adapters)
        began = time.perf_counter()
        lowered = lower_case(case, config, make_bank(config, adapters, targets), None, device)
        with tempfile.TemporaryDirectory() as folder:
            compiled = lowered.compile(dump_options(Path(folder)))
            thunks = read_thunks(Path(folder))
        attention = config.layers[0].attention
        cache_bytes = 2 * config.num_layers * 8 * 1024 * attention.num_kv_heads * attention.head_dim * 2
        line = {
            "adapters": adapters,
            "targets": targets,
            "graphs": thunks.graphs,
            "inside": thunks.inside,
            "outside": thunks.outside,
            "donated": compiled.memory_analysis().alias_size_in_bytes >= cache_bytes,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
