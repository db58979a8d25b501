"""Times a whole model of random weights: decode steps and prefills, without adapters and with mixed ones."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.placement import bank_specs
from jax_moe_lora.benchmark.ceilings import measure_ceilings
from jax_moe_lora.benchmark.model_floor import floor_s
from jax_moe_lora.benchmark.random_model import DTYPE, Case, draw_slots, make_bank, param_shapes, random_params
from jax_moe_lora.mesh.rules import cache_specs, rows_spec, shardings
from jax_moe_lora.mesh.steps import init_cache, over_mesh
from jax_moe_lora.models import decoder
from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.quantised.for_kernels import pack_experts
from jax_moe_lora.models.quantised.schemes import quantised_formats
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.ops import Format, Implementation

REPEATS = 5
THREADS = 4  # compilations side by side
METHOD = (
    "decode: `steps` steps dispatched one after the other on a donated cache, then one block, per step; prefill: one "
    "call, blocked; median of 5 repeats after a warm-up; tokens, weights, pages and cache are random; slots go round "
    "over the adapters and the base model; compile_s beside up to three other compilations; peak_gb is the process's "
    "so far, on the first device; ranks are rounded up to whole pages; on a mesh the floor is that of one device, "
    "divided by the devices"
)


@dataclass(frozen=True)
class Compiled:
    """A compiled case.

    Attributes:
      program: the compiled function of `lower_case`.
      seconds: time of the compilation.
      temp_bytes: the program's temporary memory; None if the compiler does not say.
    """

    program: Callable[..., Any]
    seconds: float
    temp_bytes: int | None


def compile_case(
    case: Case,
    config: ModelConfig,
    make: Callable[[], AdapterBank | None],
    implementation: Implementation | None,
    formats: Mapping[str, Format] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> Compiled:
    """Compiles a case from shapes alone: weights and adapters need not exist yet.

    Args:
      case: what is timed.
      config: the model.
      make: makes the bank; only its shapes are used.
      implementation: a backend by name; None picks the best one.
      formats: of quantised weights, path -> format.
      mesh: the devices that all is split over; None for the default one.

    Returns:
      The program.
    """
    began = time.perf_counter()
    compiled = lower_case(case, config, make, implementation, formats=formats, mesh=mesh).compile()
    memory = compiled.memory_analysis()
    return Compiled(compiled, time.perf_counter() - began, getattr(memory, "temp_size_in_bytes", None))


def lower_case(
    case: Case,
    config: ModelConfig,
    make: Callable[[], AdapterBank | None],
    implementation: Implementation | None = None,
    device: jax.Device | None = None,
    formats: Mapping[str, Format] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> jax.stages.Lowered:
    """Lowers `f(params, bank, cache, *inputs) -> (cache, logits)`; bank and cache are lists of their arrays.

    Args:
      case: what is timed.
      config: the model.
      make: makes the bank; only its shapes are used.
      implementation: a backend by name; None picks the best one.
      device: the device to compile for, which need not be attached; None is the default device.
      formats: of quantised weights, path -> format.
      mesh: the devices that all is split over; None for one.

    Returns:
      The lowered function.
    """
    bank, bank_tree = _shapes(make)
    cache, cache_tree = _shapes(lambda: decoder.init_cache(config, case.batch, case.max_length, DTYPE))
    params = param_shapes(config, formats, implementation, mesh)
    if mesh is not None:
        bank = _at(bank, bank_specs(bank_tree.unflatten(bank)), mesh) if bank else bank
        cache = _at(cache, cache_specs(config, mesh, cache_tree.unflatten(cache)), mesh)
    step = over_mesh(decoder.decode if case.kind == "decode" else decoder.prefill, mesh)

    def program(params, bank, cache, *inputs):
        trees = bank_tree.unflatten(bank), cache_tree.unflatten(cache)
        after, logits = step(params, *trees, *inputs, config=config, implementation=implementation)
        return jax.tree.leaves(after), logits

    rows, prompts = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=_place_of_rows(mesh))
        for shape in ((case.batch,), (case.batch, case.length))
    )
    inputs = (rows, rows) if case.kind == "decode" else (prompts, rows, rows)
    shapes = (params, bank, cache, *inputs)
    if device is None:
        return jax.jit(program, donate_argnums=2).lower(*shapes)
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    with jax.default_device(device):
        return jax.jit(program, donate_argnums=2).lower(*placed)


def _at(shapes: Any, specs: Any, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """The shapes of a tree's arrays, split over a mesh."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings(specs, mesh)), strict=True)
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf, place in pairs]


def _place_of_rows(mesh: Mesh | None) -> NamedSharding | None:
    return None if mesh is None else NamedSharding(mesh, rows_spec(mesh))


def _shapes(make: Callable[[], Any]) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    """Shapes of a tree's arrays, and the tree's structure."""
    trees = []

    def leaves():
        values, tree = jax.tree.flatten(make())
        trees.append(tree)
        return values

    return jax.eval_shape(leaves), trees[0]


def measure(
    case: Case,
    compiled: Compiled,
    config: ModelConfig,
    params: ModelParams,
    bank: AdapterBank | None,
    steps: int,
    formats: Mapping[str, Format] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Times a compiled case.

    Args:
      case: what is timed.
      compiled: its program.
      config: the model.
      params: the model's weights.
      bank: the adapters; None for a case without.
      steps: decode steps per repeat.
      formats: of quantised weights, path -> format.
      mesh: the devices that all is split over; None for the default one.

    Returns:
      Milliseconds per step or per prefill and their spread, tokens per second, the floor, and memory.

    Raises:
      FloatingPointError: the logits are not finite.
    """
    shape, count = ((case.batch,), steps) if case.kind == "decode" else ((case.batch, case.length), 1)
    keys, place = jax.random.split(jax.random.key(1), count), _place_of_rows(mesh)
    tokens = [jax.device_put(jax.random.randint(key, shape, 0, config.vocab_size, jnp.int32), place) for key in keys]
    slots = jax.device_put(draw_slots(case, 0 if bank is None else bank.num_slots), place)
    lengths = jax.device_put(jnp.full(case.batch, case.length, jnp.int32), place)
    cache, adapters = jax.tree.leaves(_random_cache(case, config, mesh)), jax.tree.leaves(bank)
    more = () if case.kind == "decode" else (lengths,)
    times: list[float] = []
    for _ in range(1 + REPEATS):
        cache[-1] = lengths + 0  # a copy: the cache is donated
        jax.block_until_ready(cache)
        began = time.perf_counter()
        for some in tokens:
            cache, logits = compiled.program(params, adapters, cache, some, *more, slots)
        jax.block_until_ready(logits)
        times.append((time.perf_counter() - began) / count)
    if not bool(jnp.isfinite(logits).all()):
        raise FloatingPointError("the logits are not finite")
    floor = floor_s(case, config, bank, measure_ceilings(), formats) / (mesh.size if mesh else 1)
    return _figures(times[1:], case, floor) | {
        "temp_gb": None if compiled.temp_bytes is None else round(compiled.temp_bytes / 1e9, 2),
        "peak_gb": _peak_gb(),
    }


def _figures(times: Sequence[float], case: Case, floor: float) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "ms": round(median * 1e3, 3),
        "min_ms": round(min(times) * 1e3, 3),
        "max_ms": round(max(times) * 1e3, 3),
        "tokens_per_s": round(case.rows / median, 1),
        "floor_ms": round(floor * 1e3, 3),
    }


def _random_cache(case: Case, config: ModelConfig, mesh: Mesh | None) -> Cache:
    """A cache with random values in every position; a decode step attends to `case.length` of them."""
    cache = init_cache(config, case.batch, case.max_length, DTYPE, mesh)
    leaves, tree = jax.tree.flatten(cache.layers)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [_draw(None if mesh is None else x.sharding)(key, x) for key, x in zip(keys, leaves, strict=True)]
    return replace(cache, layers=jax.tree.unflatten(tree, drawn))


@cache
def _draw(place: jax.sharding.Sharding | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Random values in place of an array's own; one program per shape."""
    draw = lambda key, x: jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)  # noqa: E731
    return jax.jit(draw, donate_argnums=1, out_shardings=place)


def _peak_gb() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return None if not stats else round(stats["peak_bytes_in_use"] / 1e9, 2)


def sweep(
    config: ModelConfig,
    cases: Sequence[Case],
    targets: str,
    implementation: Implementation | None,
    steps: int,
    quantise: str | None = None,
    mesh: Mesh | None = None,
) -> Iterator[dict[str, Any]]:
    """Measures every case; one that fails does not stop the others.

    Cases with the same adapters are compiled in parallel, then measured one by one. No compilation runs during a
    measurement, because the compiler times kernels too.

    Args:
      config: the model.
      cases: what is timed.
      targets: the modules with adapters, see `random_model.sites_of`.
      implementation: a backend by name; None picks the best one.
      steps: decode steps per repeat.
      quantise: what the random weights are quantised to, a name in `quantised.schemes.SCHEMES`; None keeps them.
      mesh: the devices that all is split over; None for the default one.

    Yields:
      A row per case; the row of a failed case has `error` instead of figures.
    """
    formats = {} if quantise is None else quantised_formats(config, quantise, "The model")
    measure_ceilings()  # while there is memory for it
    params = None
    for name in dict.fromkeys(case.adapters for case in cases):
        group, make = [case for case in cases if case.adapters == name], make_bank(config, name, targets, mesh)
        longest_first = sorted(group, key=lambda case: -case.rows)
        with ThreadPoolExecutor(max_workers=THREADS) as pool:
            compile_one = partial(
                compile_case, config=config, make=make, implementation=implementation, formats=formats, mesh=mesh
            )
            work = {case: pool.submit(compile_one, case) for case in longest_first}
        if params is None:  # after the first compilations: they may need memory to time kernels
            params = random_params(config, formats, mesh)
            params = replace(params, layers=pack_experts(params.layers, DTYPE, implementation))
            jax.block_until_ready(params)
        bank = make()
        for case in group:
            row: dict[str, Any] = asdict(case) | {"targets": targets, "layers": config.num_layers}
            row |= {} if quantise is None else {"quantise": quantise}
            row |= {} if mesh is None else {"mesh": ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())}
            try:
                compiled = work[case].result()
                row["compile_s"] = round(compiled.seconds, 1)
                figures = measure(case, compiled, config, params, bank, steps, formats, mesh)
            except Exception as error:  # such as out of memory
                figures = {"error": f"{type(error).__name__}: {error}"[:300]}
            yield row | figures
        del bank  # only one at a time fits
