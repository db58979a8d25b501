"""Times loading an adapter: alone, beside the bandwidth from host to device, and while a model decodes."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import SHARED_OUTER, SIDES, LoRAAdapter, LoRAWeights, Site, uniform
from jax_moe_lora.adapters.pool import AdapterPool
from jax_moe_lora.benchmark.random_model import DTYPE, sites_of
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import init_params
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving import programs
from jax_moe_lora.serving.sampling import greedy

SLOTS, REPEATS, STEPS = 3, 5, 64
COPY_BYTES = 2**30
METHOD = (
    f"copy: a numpy array of {COPY_BYTES >> 20} MiB to the device, the best of {REPEATS}. alone: an adapter in host "
    f"memory, from `AdapterPool.load` to ready, median of {REPEATS}; its own check of finite values is in it. decode: "
    f"steps whose tokens are fetched, as `Model.generate` runs them, median of {STEPS}; under load: of the steps while "
    "another thread loads and unloads without a pause"
)


def host_adapter(name: str, sites: dict[str, Site], rank: int, shared: bool) -> LoRAAdapter:
    """A random adapter in host memory.

    Args:
      name: the adapter's name.
      sites: the modules that it changes, in all their layers.
      rank: its rank.
      shared: whether all experts share the matrices on the side of the model width (the shared-outer layout).

    Returns:
      The adapter.
    """
    some = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)

    def matrix(*shape: int) -> np.ndarray:
        return np.resize(some, shape)

    def weights(module: str, site: Site) -> LoRAWeights:
        count = {side: 1 if shared and SHARED_OUTER[module] == side else site.num_experts for side in SIDES}
        a, b = matrix(count["a"], rank, site.in_width), matrix(count["b"], site.out_width, rank)
        return uniform(a, b, 0.01, site.num_experts)

    return LoRAAdapter(name, {(layer, m): weights(m, site) for m, site in sites.items() for layer in site.layers})


def copy_bytes_per_s() -> float:
    """Bytes per second of a copy from numpy to the device."""
    values = np.zeros(COPY_BYTES // 2, ml_dtypes.bfloat16)
    times = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(jax.device_put(values))
        times.append(time.perf_counter() - began)
    return COPY_BYTES / min(times)


def measure_loads(config: ModelConfig, rank: int, batch: int, context: int) -> dict[str, Any]:
    """Times loading a per-expert adapter, and the same adapter in the shared-outer layout.

    Args:
      config: the model, whose weights are random.
      rank: the adapters' rank.
      batch: requests that decode meanwhile.
      context: tokens in the cache of each request.

    Returns:
      The bandwidth of a copy, the time of a decode step, and the figures of each adapter under its name.
    """
    sites = sites_of(config, "experts")
    params = jax.block_until_ready(init_params(config, jax.random.key(0), DTYPE))
    adapters = {
        name: host_adapter(name, sites, rank, name == "shared-outer") for name in ("per-expert", "shared-outer")
    }
    pool = AdapterPool(create_bank(sites, SLOTS, rank, None, DTYPE), _no_files)
    pool.register("resident", adapters["per-expert"], pinned=True)
    pool.load("resident")
    for name, adapter in adapters.items():
        pool.register(name, adapter)
    step = _decoder(config, params, pool, batch, context)
    copy = copy_bytes_per_s()
    alone_ms = statistics.median(_timed(step) for _ in range(STEPS)) * 1e3
    figures: dict[str, Any] = {"copy_gb_per_s": round(copy / 1e9, 2), "decode_ms": round(alone_ms, 3)}
    for name, adapter in adapters.items():
        load = partial(_reload, pool, name, adapter)
        load_s = statistics.median(_timed(load) for _ in range(REPEATS))
        nbytes = next(info.nbytes for info in pool.loaded() if info.name == name)
        under, loads = _steps_under_load(step, load)
        figures[name] = {
            "mb": round(nbytes / 1e6, 1),
            "load_ms": round(load_s * 1e3, 1),
            "share_of_copy": round(nbytes / load_s / copy, 3),
            "decode_ms_under_load": round(statistics.median(under) * 1e3, 3),
            "decode_ratio": round(statistics.median(under) * 1e3 / alone_ms, 3),
            "steps_under_load": len(under),
            "loads_meanwhile": loads,
        }
    return figures


def _no_files(folder: Path, name: str) -> LoRAAdapter:
    raise AssertionError(f"{name} is in memory")


def _reload(pool: AdapterPool, name: str, adapter: LoRAAdapter) -> None:
    """Takes the adapter out of its slot and loads it again."""
    pool.forget(name)
    pool.register(name, adapter)
    pool.load(name)


def _decoder(config: ModelConfig, params: Any, pool: AdapterPool, batch: int, context: int) -> Callable[[], Any]:
    """A decode step of a batch in which every second request uses the resident adapter."""
    length = 1 << (context + REPEATS * STEPS).bit_length()
    cache = [decoder.init_cache(config, batch, length, DTYPE)]
    (slot,) = pool.slots(["resident"])
    slots = jnp.asarray(np.where(np.arange(batch) % 2, slot, -1), jnp.int32)
    sampling, index = greedy(batch), jnp.ones(batch, jnp.int32)
    lengths = jnp.full(batch, context, jnp.int32)
    prompts = jnp.zeros((batch, context), jnp.int32)
    static = {"config": config, "implementation": None}
    cache[0], drawn = pool.pausing_loads(
        lambda bank: programs.start(params, bank, cache[0], prompts, lengths, slots, sampling, **static)
    )

    def step() -> None:
        def advance(bank):
            return programs.advance(params, bank, cache[0], drawn.tokens, slots, sampling, index, None, **static)

        cache[0], after = pool.using(advance)
        np.asarray(after.tokens)

    step()
    return step


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _steps_under_load(step: Callable[[], Any], load: Callable[[], Any]) -> tuple[list[float], int]:
    """Seconds of each step while another thread keeps loading, and the number of loads."""
    stop, loads = threading.Event(), itertools.count()

    def keep_loading() -> None:
        while not stop.is_set():
            load()
            next(loads)

    thread = threading.Thread(target=keep_loading)
    thread.start()
    try:
        times = [_timed(step) for _ in range(STEPS)]
    finally:
        stop.set()
        thread.join()
    return times, next(loads)
