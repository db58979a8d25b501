"""The whole model on an H100 or H200: `JAX_PLATFORMS=cuda pytest -m gpu -s -k gpu_model`.

Two layers of Qwen3-30B-A3B at full width, random weights, eight adapters on every projection mixed in the batch.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.bank import empty_slot, remove
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, uniform
from jax_moe_lora.adapters.updates import compile_updates
from jax_moe_lora.benchmark.model import lower_case
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.benchmark.random_model import Case, draw_slots, make_bank
from jax_moe_lora.models import decoder
from jax_moe_lora.models.blocks.attention import attend_cache, attend_prompt, choose_attention
from jax_moe_lora.models.params import init_params
from jax_moe_lora.tools.compilations import count_compilations
from support import ROOT
from support.thunks import dump_options, read_thunks

pytestmark = pytest.mark.gpu("hopper")

CONFIG = model_config("qwen3-30b-a3b", 2)
BATCH, CONTEXT, MAX_LENGTH, WIDTH = 18, 24, 64, 32
ATTENTION = CONFIG.layers[0].attention
HEADS = {name: getattr(ATTENTION, name) for name in ("num_heads", "num_kv_heads", "head_dim")}


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0), "bfloat16")


@pytest.fixture(scope="module")
def bank():
    return make_bank(CONFIG, "s8r16", "all")()


@pytest.fixture(scope="module")
def steps(params):
    """`prefill(bank, slots) -> (cache, logits)` of ragged prompts, one row unused, and `decode(bank, cache, slots)`."""
    rng = np.random.default_rng()
    prompts = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (BATCH, WIDTH)), jnp.int32)
    lengths = jnp.asarray(np.concatenate([[0], rng.integers(1, WIDTH + 1, BATCH - 1)]), jnp.int32)
    prefill = jax.jit(partial(decoder.prefill, config=CONFIG))
    decode = jax.jit(partial(decoder.decode, config=CONFIG))

    def run_prefill(bank, slots):
        empty = decoder.init_cache(CONFIG, BATCH, MAX_LENGTH, "bfloat16")
        return prefill(params, bank, empty, prompts, lengths, slots)

    return run_prefill, lambda bank, cache, slots: decode(params, bank, cache, prompts[:, 0], slots)


def every_slot() -> jax.Array:
    return draw_slots(Case("decode", BATCH, CONTEXT, MAX_LENGTH, "s8r16"), 8)


@pytest.mark.parametrize(("adapters", "targets"), [("none", "experts"), ("s8r16", "all")])
def test_a_decode_step_is_cuda_graphs_and_its_cache_stays_in_place(params, tmp_path, adapters, targets):
    case = Case("decode", BATCH, CONTEXT, MAX_LENGTH, adapters)
    make = make_bank(CONFIG, adapters, targets)
    compiled = lower_case(case, CONFIG, make).compile(dump_options(tmp_path))
    thunks = read_thunks(tmp_path)
    inside, outside = sum(thunks.inside.values()), sum(thunks.outside.values())
    print(
        f"\n{adapters} on {targets}: {thunks.graphs} graphs with {dict(thunks.inside)}; outside {dict(thunks.outside)}"
    )
    assert not {"kWhile", "kConditional"} & (thunks.inside.keys() | thunks.outside.keys())
    assert outside <= 0.05 * inside

    cache = decoder.init_cache(CONFIG, BATCH, MAX_LENGTH, "bfloat16")
    cache = jax.tree.leaves(replace(cache, lengths=jnp.full(BATCH, CONTEXT, jnp.int32)))
    where = [leaf.unsafe_buffer_pointer() for leaf in cache[:-1]]
    bank, slots = jax.tree.leaves(make()), every_slot()
    for _ in range(3):
        cache, logits = compiled(params, bank, cache, jnp.zeros(BATCH, jnp.int32), slots)
        assert [leaf.unsafe_buffer_pointer() for leaf in cache[:-1]] == where
    assert bool(jnp.isfinite(logits).all())


def test_base_rows_are_exact_and_mixed_equals_solo(bank, steps):
    prefill, decode = steps
    slots = every_slot()

    def logits(bank, slots):
        cache, first = prefill(bank, slots)
        return jnp.stack([first, decode(bank, cache, slots)[1]])

    mixed, base = logits(bank, slots), logits(None, slots)
    assert bool(jnp.isfinite(mixed).all())
    nobody = slots < 0
    assert bool((mixed[:, nobody] == base[:, nobody]).all()), "base rows changed"
    assert bool((mixed[:, ~nobody][:, 1:] != base[:, ~nobody][:, 1:]).any(-1).all()), "the adapters change nothing"
    for slot in range(8):
        own = slots == slot
        solo = logits(bank, jnp.where(own, slot, -1))
        assert bool((solo[:, own] == mixed[:, own]).all()), f"mixed differs from solo in slot {slot}"


def test_a_hundred_replays_have_equal_bits(bank, steps):
    prefill, decode = steps
    cache, _ = prefill(bank, every_slot())
    first = decode(bank, cache, every_slot())[1]
    same = [(decode(bank, cache, every_slot())[1] == first).all() for _ in range(100)]
    assert bool(jnp.stack(same).all())


def test_loading_an_adapter_between_steps_compiles_nothing_and_moves_nothing(steps):
    """A CUDA graph is recorded with its buffers' addresses: where they stay, the graph stays."""
    prefill, decode = steps
    bank, slots, rng = make_bank(CONFIG, "s8r16", "all")(), every_slot(), np.random.default_rng()

    def adapter(rank: int) -> LoRAAdapter:
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32) * 0.05  # noqa: E731
        weights = {}
        for module, site in bank.sites:
            for layer in site.layers:
                a, b = draw(1, rank, site.in_width), draw(1, site.out_width, rank)
                weights[layer, module] = uniform(a, b, 1.0, site.num_experts)
        return LoRAAdapter(f"rank {rank}", weights)

    compile_updates(bank.pools, bank.tables, bank.scales, *empty_slot(bank))  # as create_bank does
    bank = insert(remove(bank, 3, donate=True), 3, adapter(16), donate=True)
    cache, _ = prefill(bank, slots)
    before = decode(bank, cache, slots)[1]
    used = lambda bank: jax.tree.leaves((bank.pools, bank.tables, bank.scales))  # noqa: E731
    where = [leaf.unsafe_buffer_pointer() for leaf in used(bank)]
    with count_compilations() as count:
        bank = insert(remove(bank, 3, donate=True), 3, adapter(5), donate=True)
        after = decode(bank, cache, slots)[1]
    assert count.compilations == 0
    assert [leaf.unsafe_buffer_pointer() for leaf in used(bank)] == where
    changed = (before != after).any(-1)
    # Row 0 is unused: it is a base row whatever slot it names.
    assert bool((changed == ((slots == 3) & (jnp.arange(BATCH) > 0))).all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("batch", [1, 8])
def test_cudnn_attention_equals_xla(dtype, batch):
    choice = choose_attention(dtype=dtype, **HEADS)
    assert choice.picked == "cudnn", choice.why_not
    keys = jax.random.split(jax.random.key(batch), 3)

    def draw(key, length, heads):
        return jax.random.normal(key, (batch, length, heads, ATTENTION.head_dim), jnp.float32).astype(dtype)

    def compare(name, function):
        run = {backend: jax.jit(partial(function, backend=backend)) for backend in ("cudnn", "xla")}

        def check(*operands):
            cudnn, xla = (run[backend](*operands).astype(jnp.float32) for backend in ("cudnn", "xla"))
            error = float(jnp.linalg.norm(cudnn - xla) / jnp.linalg.norm(xla))
            print(f"\n{name}, batch {batch}, {dtype}: relative difference {error:.2e}")
            assert error < {"bfloat16": 1e-2, "float16": 2e-3}[dtype]
            assert bool(jnp.isfinite(cudnn).all())
            again = [(run["cudnn"](*operands).astype(jnp.float32) == cudnn).all() for _ in range(20)]
            assert bool(jnp.stack(again).all())

        return check

    for length in (1, 7, 512):
        q, k, v = draw(keys[0], length, HEADS["num_heads"]), *(draw(key, length, 4) for key in keys[1:])
        compare(f"prompt of {length}", attend_prompt)(q, k, v)
    q, k, v = draw(keys[0], 1, HEADS["num_heads"]), *(draw(key, 1024, 4) for key in keys[1:])
    lengths = jnp.asarray([1, 1024, 2, 63, 64, 65, 500, 1023][-batch:], jnp.int32)
    compare("cache", attend_cache)(q, k, v, lengths)


WITH_THE_LIBRARY = """
import sys
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.benchmark.random_model import make_bank
from jax_moe_lora.export import decode_arguments, export_decode
from jax_moe_lora.serving.model import Model
from jax_moe_lora.models.params import init_params

folder = sys.argv[1]
config = model_config("qwen3-30b-a3b", 1)
layer = config.layers[0]
mlp = replace(layer.mlp, moe=replace(config.moe, num_experts=8, top_k=2))
config = replace(config, vocab_size=1024, layers=(replace(layer, mlp=mlp),))
bank = make_bank(config, "s8r16", "all")()
fn = Model(config, init_params(config, jax.random.key(0), "bfloat16"), bank).functional(batch=4, max_length=64)
slots = jnp.asarray([0, -1, 5, 7], jnp.int32)
prompt = jax.random.randint(jax.random.key(1), (4, 16), 0, 1024, jnp.int32)
cache, _ = jax.jit(fn.prefill)(fn.params, fn.bank, fn.init_cache(), prompt, jnp.asarray([16, 3, 9, 1]), slots)
arrays = decode_arguments(fn, cache, prompt[:, 0], slots)
outputs = jax.tree.leaves(jax.jit(fn.decode)(fn.params, fn.bank, cache, prompt[:, 0], slots))
step = export_decode(fn)
open(folder + "/step.bin", "wb").write(step.program)
for name, some in (("inputs", arrays), ("expected", outputs)):
    # bfloat16 as its bits: numpy's format does not know it
    bits = [np.asarray(x).view(np.uint16) if x.dtype == jnp.bfloat16 else np.asarray(x) for x in some]
    np.savez(folder + f"/{name}.npz", **{f"{i:05d}": x for i, x in enumerate(bits)})
"""
WITHOUT_IT = """
import sys
import jax.export, jax.experimental.pallas.mosaic_gpu
import jax.numpy as jnp, numpy as np

folder = sys.argv[1]
step = jax.export.deserialize(bytearray(open(folder + "/step.bin", "rb").read()))
with np.load(folder + "/inputs.npz") as saved:
    inputs = [saved[name].view(aval.dtype) for name, aval in zip(sorted(saved.files), step.in_avals)]
outputs = step.call(*inputs)
with np.load(folder + "/expected.npz") as saved:
    for name, found in zip(sorted(saved.files), outputs, strict=True):
        assert (np.asarray(found) == saved[name].view(found.dtype)).all(), f"output {name} differs"
assert "jax_moe_lora" not in sys.modules and "pallas_kernels" not in sys.modules
print("equal bits in", len(outputs), "outputs")
"""


def test_an_exported_step_gives_the_same_bits_without_the_library(tmp_path):
    """Two fresh processes on the GPU that share XLA's choice of matmul kernels."""
    (tmp_path / "autotune").mkdir()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_per_fusion_autotune_cache_dir={tmp_path / 'autotune'}"
    env = os.environ | {"XLA_FLAGS": flags.strip(), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    library = env | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", WITH_THE_LIBRARY, tmp_path], check=True, env=library)
    subprocess.run([sys.executable, "-I", "-c", WITHOUT_IT, tmp_path], check=True, env=env)
