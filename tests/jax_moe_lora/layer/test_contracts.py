"""The promises of the layer, one by one; the numbers are those of the design."""

import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import AdapterFormatError, InputError, count_compilations
from jax_moe_lora.adapters.bank import remove
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.layer.moe import moe_lora
from jax_moe_lora.layer.reference import moe_lora as oracle
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.decoder import adapter_sites
from pallas_kernels.ops import make_plan
from pallas_kernels.routed_experts.weights import ExpertWeights
from support import ROOT
from support.layers import LAYER, Problem, Spec, assert_close, draw
from support.models import ADAPTER_NAMES

pytestmark = pytest.mark.optimised

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
SPECS = {
    "float32": Spec(),
    "bfloat16": Spec(dtype="bfloat16", tokens=64, experts=4, top_k=2),
    "float16": Spec(dtype="float16", tokens=5, hidden=96, width=32, experts=16, top_k=4),
    "one-token": Spec(tokens=1),
    "many-rows": Spec(tokens=300, experts=3, top_k=2),
    "gpt-oss": Spec(as_gpt_oss=True, tokens=20),
}
NEWEST = dict.fromkeys(("bfloat16", "gpt-oss"), (pytest.mark.newest,))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == "float32" else (pytest.mark.slow, *NEWEST.get(name, ())))
        for name in SPECS
    ],
)
def problem(request) -> Problem:
    return draw(SPECS[request.param])


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b)  # -0 equals +0, NaN equals nothing


def test_1_base_rows_are_exact(problem):
    mixed, base = problem.run(), problem.run(base=True)
    rows = problem.slots == -1
    assert equal_bits(mixed[rows], base[rows])
    nobody = np.full_like(problem.slots, -1)
    assert equal_bits(problem.run(nobody), base)


def test_2_mixed_equals_solo(problem):
    mixed = problem.run()
    for slot in range(len(problem.adapters)):
        own = problem.slots == slot
        solo = problem.run(np.where(own, slot, -1))
        assert equal_bits(mixed[own], solo[own]), problem.adapters[slot].name


@pytest.mark.slow
@pytest.mark.newest
def test_2_a_rows_neighbours_may_be_anything():
    """Other tokens, not only other adapters: a row's tile and place change, its bits do not."""
    problem = draw(Spec(tokens=40))
    mixed = problem.run()
    other = draw(Spec(tokens=40, seed=1))
    changed = np.where(np.arange(40)[:, None] % 2 == 0, problem.x, other.x)
    assert equal_bits(replace(problem, x=changed).run()[::2], mixed[::2])


def test_3_shared_equals_replicated(problem):
    shared = next(i for i, a in enumerate(problem.adapters) if a.name.startswith("shared_outer"))
    copies = {}
    for key, w in problem.adapters[shared].weights.items():
        full = {
            side: np.array(np.broadcast_to(m, (len(w.ranks), *m.shape[1:]))) for side, m in (("a", w.a), ("b", w.b))
        }
        copies[key] = replace(w, **full)
    replicated = insert(remove(problem.bank, shared), shared, LoRAAdapter("replicated", copies))
    assert replicated.slot_nbytes(shared) > problem.bank.slot_nbytes(shared)
    assert equal_bits(problem.run(), problem.run(bank=replicated))


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("side", ["a", "b"])
def test_4_zero_adapters_are_exact(side):
    problem = draw(Spec())
    bank = problem.bank
    for slot, adapter in enumerate(problem.adapters):
        zeroed = {k: replace(w, **{side: np.zeros_like(getattr(w, side))}) for k, w in adapter.weights.items()}
        bank = insert(remove(bank, slot), slot, LoRAAdapter("zero", zeroed))
    assert equal_bits(problem.run(bank=bank), problem.run(base=True))
    chosen = jnp.zeros((len(problem.slots), 1), jnp.int32)
    assert int(make_plan(chosen, jnp.asarray(problem.slots, jnp.int32), 8, 6).lora_tiles.count) > 0, "nothing ran"
    assert not equal_bits(problem.run(), problem.run(base=True))


def test_5_nothing_recompiles():
    problem = draw(Spec())
    bank = insert(remove(problem.bank, 0), 0, problem.adapters[0])
    problem.run(bank=bank)
    with count_compilations() as count:
        bank = remove(bank, 0)
        problem.run(bank=bank)
        bank = insert(bank, 0, problem.adapters[2])  # another layout and rank in a used slot
        bank = insert(bank, 5, problem.adapters[4])
        problem.run(np.roll(problem.slots, 3), bank=bank)
        problem.run(np.full_like(problem.slots, 5), bank=bank)
    assert count.compilations == 0


@pytest.mark.parametrize("slot", [-2, -(2**31), 6, 7, 1000, 2**31 - 1])
def test_6_a_slot_out_of_range_is_a_base_row(slot):
    problem = draw(Spec())
    slots = np.where(problem.slots == 1, slot, problem.slots)
    mixed, base = problem.run(slots), problem.run(base=True)
    assert equal_bits(mixed[problem.slots == 1], base[problem.slots == 1])
    assert equal_bits(mixed[problem.slots != 1], problem.run()[problem.slots != 1])


def test_6_a_removed_slot_is_out_of_reach_at_once():
    problem = draw(Spec())
    after, base, before = problem.run(bank=remove(problem.bank, 2)), problem.run(base=True), problem.run()
    gone = problem.slots == 2
    assert equal_bits(after[gone], base[gone])
    assert equal_bits(after[~gone], before[~gone])


def test_6_unused_pages_reach_nobody():
    """Pages that no slot holds are poisoned with NaN."""
    problem = draw(Spec())
    bank = remove(problem.bank, 3)
    free = [(owner == -1)[:, None, None] for owner in bank.owners]
    poisoned = tuple(jnp.where(pages, jnp.nan, pool) for pages, pool in zip(free, bank.pools, strict=True))
    assert any(bool(jnp.isnan(pool).any()) for pool in poisoned)
    assert equal_bits(problem.run(bank=replace(bank, pools=poisoned)), problem.run(bank=bank))


NOT_UNDERSTOOD = {
    "unknown": ("layers.0.mlp.experts.lora_C.weight", "is not understood: expected"),
    "DoRA": ("layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA is not supported"),
    "a layer too many": (
        "layers.99.self_attn.q_proj.lora_A.weight",
        "no q projection in layer 99; if the adapter was trained for another model",
    ),
    "not targeted": ("layers.0.self_attn.q_proj.lora_A.weight", "does not target"),
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_7_nothing_is_silent(tmp_path, case):
    """A key more in the shipped adapter `upper`: nothing is loaded, and the error names the key, its file and why."""
    end, why = NOT_UNDERSTOOD[case]
    key = f"base_model.model.model.{end}"
    shutil.copytree(data_folder() / "adapters" / "upper", tmp_path / "upper")
    file = tmp_path / "upper" / "adapter_model.safetensors"
    extra = {key: np.zeros((4, 64), np.float32)}
    if "lora_A" in key:
        extra[key.replace("lora_A", "lora_B")] = np.zeros((64, 4), np.float32)
    save_file({**load_file(file), **extra}, file)
    model_config = read_model_config(data_folder() / "model")
    with pytest.raises(AdapterFormatError) as refused:
        read_adapter(tmp_path / "upper", adapter_sites(model_config), ADAPTER_NAMES)
    assert all(part in str(refused.value) for part in (key, str(file), why)), refused.value


def test_7_a_projection_that_the_model_lacks_is_never_dropped():
    problem = draw(Spec())
    weights = {**problem.adapters[0].weights, (0, "nose"): problem.adapters[0].weights[0, "gate"]}
    with pytest.raises(
        AdapterFormatError, match="'both', layer 0, nose: the model has no such projection, or was loaded"
    ):
        insert(remove(problem.bank, 0), 0, LoRAAdapter("both", weights))


@pytest.mark.slow
@pytest.mark.newest
def test_7_both_forms_of_slots_give_equal_bits_and_never_mix():
    problem = draw(Spec())
    lengths, slots = jnp.array([10, 0, 20, 5]), jnp.array([2, 1, -1, 0])
    per_token = np.array([2] * 10 + [-1] * 20 + [0] * 5 + [-1] * 2)
    arguments = [jnp.asarray(w) for w in (problem.x, problem.router)]
    experts = ExpertWeights(*[jnp.asarray(w) for w in (problem.gate, problem.up, problem.down)])

    def run(**form):
        return moe_lora(*arguments, experts, problem.spec.config, problem.bank.layer(0), **form)

    per_request = LAYER(
        *arguments, experts, problem.spec.config, problem.bank.layer(0), request_lengths=lengths, request_slots=slots
    )
    assert equal_bits(np.asarray(per_request), problem.run(per_token))
    with pytest.raises(InputError, match="slots came together with request_lengths"):
        run(slots=jnp.asarray(per_token, jnp.int32), request_lengths=lengths, request_slots=slots)
    with pytest.raises(InputError, match="request_lengths came without request_slots"):
        run(request_lengths=lengths)
    with pytest.raises(InputError, match="request_slots came without request_lengths"):
        run(request_slots=slots)
    with pytest.raises(InputError, match="at most 37"):
        run(request_lengths=jnp.array([30, 30]), request_slots=jnp.array([0, 1]))


@pytest.mark.slow
def test_8_the_same_bits_run_after_run_and_process_after_process():
    problem = draw(Spec())
    assert equal_bits(problem.run(), problem.run())
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; "
        "from support.layers import Spec, draw; import hashlib; "
        "print(hashlib.sha256(draw(Spec()).run().tobytes()).hexdigest())"
    )
    hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(hashes) == 1
    assert len(hashes.pop().strip()) == 64


def test_9_the_layer_equals_the_oracle(problem):
    assert_close(problem.run(), problem.expected(), TOLERANCE[problem.spec.dtype])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    ("kind", "renormalize", "scaling"),
    [
        ("softmax_topk", False, 1.0),
        ("topk_softmax", False, 1.5),
        ("sigmoid_bias", True, 2.5),
        ("softmax_bias", True, 1.0),
        ("sparsemixer", False, 1.0),
    ],
)
def test_9_every_router_kind_equals_the_oracle(kind, renormalize, scaling, implementation):
    problem = draw(Spec())
    top_k = 2 if kind == "sparsemixer" else 3
    config = MoEConfig(64, 48, 8, top_k, router=kind, renormalize=renormalize, scaling=scaling)
    bias = np.random.default_rng(5).normal(size=8).astype(np.float32)
    weights = (problem.x, problem.router, problem.gate, problem.up, problem.down)
    x, router, *experts = (jnp.asarray(w) for w in weights)
    y = LAYER(
        x,
        router,
        ExpertWeights(*experts),
        config,
        router_bias=jnp.asarray(bias),
        implementation=implementation,
    )
    options = {"router_kind": kind, "renormalize": renormalize, "scaling": scaling, "router_bias": bias}
    assert_close(np.asarray(y), oracle(*weights, [None] * 37, top_k=top_k, **options), 1e-5)


@pytest.mark.slow
@pytest.mark.newest
def test_masked_rows_cost_nothing_and_give_zeros():
    problem = draw(Spec())
    mask = np.arange(37) % 3 > 0
    x = jnp.asarray(np.where(mask[:, None], problem.x, np.nan))  # padding may hold anything
    experts = ExpertWeights(*[jnp.asarray(w) for w in (problem.gate, problem.up, problem.down)])
    y = LAYER(
        x, jnp.asarray(problem.router), experts, problem.spec.config, problem.bank.layer(0),
        jnp.asarray(problem.slots, jnp.int32), row_mask=jnp.asarray(mask),
    )  # fmt: skip
    assert equal_bits(np.asarray(y)[mask], problem.run()[mask])
    assert not np.asarray(y)[~mask].any()


def test_shapes_that_disagree_with_the_config_are_named():
    problem = draw(Spec())
    x, router = jnp.asarray(problem.x), jnp.asarray(problem.router)
    experts = ExpertWeights(*[jnp.asarray(w) for w in (problem.gate, problem.down, problem.down)])
    with pytest.raises(InputError, match=r"up has shape \[8, 64, 48\]; expected \[8, 48, 64\]"):
        moe_lora(x, router, experts, problem.spec.config)
    with_biases = draw(SPECS["gpt-oss"])
    with pytest.raises(InputError, match="gate_bias is missing; the config says that experts have biases"):
        moe_lora(x, router, problem.experts, with_biases.spec.config)
    with pytest.raises(InputError, match=r"gate_bias has shape \[8, 48\]; the config says that experts have no biases"):
        moe_lora(x, router, with_biases.experts, problem.spec.config)


def test_a_donated_bank_is_reused_in_place():
    problem = draw(Spec())
    expected = problem.run()
    copy = jax.tree.map(jnp.copy, problem.bank)
    bank = insert(remove(copy, 0, donate=True), 0, problem.adapters[0], donate=True)
    assert copy.pages[64].is_deleted()
    assert equal_bits(problem.run(bank=bank), expected)
