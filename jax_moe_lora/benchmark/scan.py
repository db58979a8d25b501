"""Unrolled layers beside `lax.scan` over stacked layers: `python -m jax_moe_lora.benchmark.scan --out results.json`.

Times the forward pass of random decoders with adapters on every projection, and its compilation.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.bank import AdapterBank, create_bank
from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.blocks.norm import apply_norm
from jax_moe_lora.models.params import LayerParams, ModelParams, init_params
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig
from pallas_kernels.grouped_matmul.bench import write_report
from pallas_kernels.specs import LAYERS, MoEShape


def scanned_logits(
    params: ModelParams,
    stacked: LayerParams,
    bank: AdapterBank,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
) -> Float[Array, "B T V"]:
    """`decoder.logits` with one compiled layer over stacked weights, for models whose layers are all alike."""
    step = decoder.prompt_step(tokens, lengths, slots, bank, None)
    pages = bank.layer(0)

    def body(hidden: Array, xs: tuple[LayerParams, dict, dict]) -> tuple[Array, None]:
        layer, tables, scales = xs
        adapters = replace(pages, tables=tables, scales=scales)
        return decoder.run_layer(config.layers[0], layer, adapters, hidden, step, None)[0], None

    hidden, _ = lax.scan(body, params.embedding[tokens], (stacked, bank.tables, bank.scales))
    return decoder.head(params, apply_norm(config.norm, hidden, params.norm), config)


def _config(layers: int, spec: MoEShape) -> ModelConfig:
    width = spec.hidden_size
    moe = MoEConfig(width, spec.expert_width, spec.num_experts, spec.top_k, renormalize=True)
    layer = LayerSpec(GQA(8, 2, width // 8, RopeConfig(), qk_norm="head"), RoutedMLP(moe))
    return ModelConfig("qwen3_moe", 512, width, (layer,) * layers)


def measure(layers: int, shape: str, dtype: str, batch: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Times compilation and forward pass, unrolled and scanned.

    Args:
      layers: number of layers.
      shape: a layer in `specs.LAYERS`.
      dtype: of the weights.
      batch: number of prompts.
      tokens: tokens per prompt.
      repeats: number of timings.

    Returns:
      A row for each of the two forms.
    """
    config = _config(layers, LAYERS[shape])
    params = init_params(config, jax.random.key(0), dtype)
    bank = create_bank(decoder.layer_sites(config), 4, 16, None, dtype)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers)
    inputs = (
        jax.random.randint(jax.random.key(1), (batch, tokens), 0, 512),
        jnp.full(batch, tokens, jnp.int32),
        jnp.arange(batch, dtype=jnp.int32) % 4,
    )
    unrolled = jax.jit(partial(decoder.logits, config=config))
    scanned = jax.jit(partial(scanned_logits, config=config))
    rows = []
    for name, function, arguments in (
        ("unroll", unrolled, (params, bank, *inputs)),
        ("scan", scanned, (params, stacked, bank, *inputs)),
    ):
        began = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        compile_seconds = time.perf_counter() - began
        jax.block_until_ready(compiled(*arguments))
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append((time.perf_counter() - began) * 1e3)
        memory = compiled.memory_analysis()
        rows.append(
            {
                "layers": layers,
                "shape": shape,
                "dtype": dtype,
                "batch": batch,
                "tokens": tokens,
                "form": name,
                "compile_s": round(compile_seconds, 2),
                "ms": round(statistics.median(times), 2),
                "temp_bytes": getattr(memory, "temp_size_in_bytes", None),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 8, 24])
    parser.add_argument("--shape", default="small", choices=LAYERS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [
        row
        for layers in args.layers
        for batch, tokens in ((8, 1), (8, 32))
        for row in measure(layers, args.shape, args.dtype, batch, tokens, args.repeats)
    ]
    if args.out:
        write_report(
            args.out, "one forward pass, median of repeats; adapters' bank of 4 slots, no adapter loaded", rows
        )


if __name__ == "__main__":
    main()
