"""Strict defaults for the whole suite: no silent promotion, shapes checked at run time, float32 as float32.

On a CPU the compiled programs are kept in the clone, for the tests that need the same ones and for the next run.
"""

import gc
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_MOE_LORA_PROGRAMS"] = ""  # tests replace functions, which kept programs would not see
os.environ.setdefault("NPROC", "16")  # the GPU interpreter needs a thread for each warpgroup; read when jax starts

if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Parameter trees are left out: they also hold shapes, shardings and numpy arrays.
KERNELS = [
    "activations",
    "backend",
    "dispatch",
    "grouped_lora",
    "grouped_matmul",
    "hopper",
    "lora_steps",
    "plan",
    "portable",
    "routed_experts.api",
    "routed_experts.projections",
    "router",
    "token_heads.api",
    "token_heads.portable",
    "token_heads.xla",
    "xla",
]
CHECKED = [
    "layer.moe",
    "layer.linear",
    "layer.routing",
    "layer.nn",
    "serving.programs",
    "serving.sampling",
    "adapters.bank",
    "adapters.extraction",
    "models.blocks",
    "models.cache",
    "models.cache_rows",
    "models.decoder",
    "models.decoder_layer",
    "models.rope",
    "models.steps",
    "models.vocabulary",
]
UNOPTIMISED = "jax_disable_most_optimizations"
_hooked = [f"pallas_kernels.{name}" for name in KERNELS] + [f"jax_moe_lora.{name}" for name in CHECKED]
_root = Path(__file__).parents[1]
if _gone := [name for name in _hooked if not [*_root.glob(name.replace(".", "/") + "*")]]:
    raise pytest.UsageError(f"tests/conftest.py checks the shapes of modules that are not there: {', '.join(_gone)}.")
_hook = install_import_hook(_hooked, "beartype.beartype")


def seconds_of(item: pytest.Item) -> float:
    """About how much CPU a test takes."""
    slow = item.get_closest_marker("slow")
    return 0.2 if slow is None else next(iter(slow.args), 4)


def group_of(item: pytest.Item) -> str:
    """Tests of one group run in one worker: those of a file, because what one of them compiles the others have.

    A test that says how many seconds it takes, `slow(60)`, is long enough to be alone; those of a class share what it
    takes to set them up.
    """
    if group := item.get_closest_marker("xdist_group"):
        return group.args[0]
    slow = item.get_closest_marker("slow")
    alone = slow is not None and slow.args and getattr(item, "cls", None) is None
    return item.nodeid if alone else f"{item.path.parent.name}/{item.path.stem}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups for the workers, the longest ones first, so that the workers end together."""
    seconds: Counter[str] = Counter()
    for item in items:
        seconds[group_of(item)] += seconds_of(item)
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (-seconds[group_of(item)], group_of(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    from support.gpu import skip_without_gpu  # imports the kernels, whose shapes the hook above must see first

    skip_without_gpu(item)
    compile_for(item)


def compile_for(item: pytest.Item) -> None:
    """Compiles what is compared within a tolerance without LLVM's optimisations: that takes half the time.

    Tests that compare bits have the marker `optimised`. The two kinds share no program that is in memory; on disk, the
    options are part of a program's key.
    """
    unoptimised = os.environ["JAX_PLATFORMS"] == "cpu" and item.get_closest_marker("optimised") is None
    if jax.config.read(UNOPTIMISED) != unoptimised:
        jax.config.update(UNOPTIMISED, unoptimised)
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_kept_programs_where_compilations_are_counted(request):
    if "count_compilations" not in request.function.__code__.co_names:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Lets go of compiled programs before there are too many.

    XLA maps memory for each program on a CPU, and dies in the next compilation where Linux's limit of 65,530 maps a
    process is reached.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
