"""Small models on one device and on meshes of CPU devices, with adapters of every layout.

Scripts that use it run in processes of their own, which have more than one device: `run_on_devices`.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh

from jax_moe_lora import Model
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site, uniform
from jax_moe_lora.mesh.rules import check_mesh, make_mesh, param_specs, parse_mesh, shardings, split_sites
from jax_moe_lora.mesh.scaling.sums import layer_sums
from jax_moe_lora.models.params import init_params
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.models.specs.model import ModelConfig
from support import ROOT

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LAYOUTS = ("per_expert", "shared_outer", "fused", "some_experts")
OUTER = {("gate", "a"), ("up", "a"), ("down", "b")}


def run_on_devices(count: int, module: str, *arguments: str) -> list[Any]:
    """What a module of `support` prints as lines of JSON, in a process with so many CPU devices."""
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time what is compared within a tolerance
    }
    command = [sys.executable, "-m", f"support.{module}", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def summed_bytes(text: str) -> list[int]:
    """The bytes of each sum of a compiled program, sorted."""
    shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    sizes = {"f32": 4, "bf16": 2}
    arrays = [re.findall(r"(f32|bf16)\[([\d,]*)\]", shape) for shape in shapes]
    return sorted(sum(sizes[kind] * math.prod(map(int, dims.split(","))) for kind, dims in some) for some in arrays)


def predicted_bytes(config: ModelConfig, mesh: str, rows: int) -> list[int]:
    """What the scaling model says of them, for so many rows in each part of `data`, in float32."""
    sizes = parse_mesh(mesh)
    grid = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    sums = [one for layer in config.layers for one in layer_sums(layer, config.hidden_size, rows, 4, grid)]
    return sorted(one.nbytes for one in sums)


def report(**values: Any) -> None:
    """A line for `run_on_devices`."""
    print(json.dumps(values), flush=True)


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters large enough for each to matter, biases and norms too."""
    rng = np.random.default_rng(seed)
    shapes = init_params(config, jax.random.key(0), "float32")
    return jax.tree.map(lambda leaf: np.asarray(rng.normal(scale=0.2, size=leaf.shape), np.float32), shapes)


def random_adapter(layout: str, sites: Mapping[str, Site], seed: int, rank: int = 20) -> LoRAAdapter:
    """An adapter on every projection; of two pages, the second one not full."""
    rng = np.random.default_rng(seed)
    weights: dict[tuple[int, str], LoRAWeights] = {}
    for module, site in sites.items():

        def matrices(side: str, *shape: int, module: str = module, experts: int = site.num_experts) -> np.ndarray:
            shared = layout == "shared_outer" and (module, side) in OUTER
            return rng.normal(scale=0.3, size=(1 if shared else experts, *shape)).astype(np.float32)

        for layer in site.layers:
            a, b = matrices("a", rank, site.in_width), matrices("b", site.out_width, rank)
            if layout == "fused" and module == "up":
                a = weights[layer, "gate"].a
            made = uniform(a, b, 0.2, site.num_experts)
            if layout == "some_experts" and site.num_experts > 1:
                made = replace(made, ranks=np.where(np.arange(site.num_experts) % 3 == 0, 0, made.ranks))
            weights[layer, module] = made
    return LoRAAdapter(layout, weights)


def make_model(config: ModelConfig, params: Any, mesh: str | None, max_adapters: int = 4) -> Model:
    """A model of these parameters on a mesh, or on one device, without adapters."""
    devices, sites = make_mesh(mesh), layer_sites(config)
    if devices is None:
        params = jax.device_put(params)
    else:
        check_mesh(config, devices)
        sites = split_sites(config, sites, devices)
        params = jax.device_put(params, shardings(param_specs(config, devices), devices))
    bank = create_bank(sites, max_adapters, 32, None, "float32", mesh=devices)
    return Model(config, params, bank, mesh=devices)


def relative(actual: Any, expected: Any) -> float:
    """Relative Frobenius error."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def same(actual: Any, expected: Any) -> bool:
    """Whether two arrays are equal bit for bit, -0 being 0."""
    return bool(np.array_equal(np.asarray(actual), np.asarray(expected)))


def collectives(text: str) -> dict[str, int]:
    """The collectives of a compiled program."""
    return {name: n for name in COLLECTIVES if (n := text.count(f" {name}(") + text.count(f" {name}-start("))}
