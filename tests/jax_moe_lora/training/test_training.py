"""The parts of a training step: adapters and their files, the bank made of params, losses by slot."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError, LoRAAdapter, write_adapter
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.training import AdapterSpec, from_adapter, init_params, to_adapter
from jax_moe_lora.training.loss import load_balancing, slot_sums, token_losses
from jax_moe_lora.training.spec import WRITTEN_AS
from jax_moe_lora.training.training_bank import training_bank
from support.layers import assert_close
from support.models import ADAPTER_NAMES
from support.trained import CONFIG, SITES, SPECS, draw, model, new_params, same_bits, task_batch

pytestmark = pytest.mark.optimised

ROUTED = MoEConfig(hidden_size=64, expert_width=48, num_experts=8, top_k=2)
ALL = ("q", "k", "v", "o", "router", "gate", "up", "down")


def adapters_of(params, specs=SPECS) -> dict[str, LoRAAdapter]:
    return {name: to_adapter(params[name], spec, SITES, name) for name, spec in specs.items()}


@pytest.mark.slow
def test_kaiming_is_peft_s_bound_and_gaussian_its_deviation():
    kaiming = init_params(AdapterSpec(rank=16, targets=ALL), SITES, jax.random.key(0))
    gaussian = init_params(AdapterSpec(rank=16, targets=ALL, init="gaussian"), SITES, jax.random.key(0))
    for key, values in kaiming.items():
        width = values.shape[2]
        if key.endswith(".b"):
            assert not np.asarray(values).any()
            continue
        assert 0.98 / width**0.5 < np.abs(np.asarray(values)).max() <= 1 / width**0.5
        assert np.asarray(values).std() == pytest.approx(1 / (3 * width) ** 0.5, rel=0.1)
        assert np.asarray(gaussian[key]).std() == pytest.approx(1 / 16, rel=0.1)
    firsts = {np.asarray(values).ravel()[0].item() for key, values in kaiming.items() if key.endswith(".a")}
    assert len(firsts) == 3 * 7, "two matrices were drawn alike"  # gate and up have one A


def test_layouts_share_what_they_say():
    shapes = {layout: AdapterSpec(rank=4, layout=layout).shapes(SITES) for layout in WRITTEN_AS}
    own = {"0.gate.b": (8, 4, 48), "0.up.b": (8, 4, 48), "0.down.a": (8, 4, 48)}
    assert {key: s for key, s in shapes["fused"].items() if key[0] == "0"} == own | {
        "0.gate_up.a": (8, 4, 64),
        "0.down.b": (8, 4, 64),
    }
    assert shapes["per-expert"]["2.gate.a"] == shapes["per-expert"]["2.up.a"] == (8, 4, 64)
    shared = {key for key, shape in shapes["shared-outer"].items() if shape[0] == 1}
    assert shared == {f"{layer}.{matrix}" for layer in range(3) for matrix in ("gate.a", "up.a", "down.b")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank of adapter 'mine' is 0; expected 1 to"),
        ({"alpha": -1.0}, "alpha of adapter 'mine' is -1.0; expected a number above zero"),
        ({"alpha": float("nan")}, "alpha of adapter 'mine' is nan"),
        ({"layout": "split"}, "layout of adapter 'mine' is 'split'; expected one of fused, per-expert, shared-outer"),
        ({"init": "zeros"}, "init of adapter 'mine' is 'zeros'; expected one of kaiming, gaussian"),
        ({"targets": ()}, "targets of adapter 'mine' are empty; expected some of q, k,"),
        ({"targets": ("gate_proj",)}, "name 'gate_proj', which this model lacks; expected q, k, v, o, router, gate"),
        ({"targets": ("q", "q")}, "name a module twice: q, q"),
        ({"ranks": (("q", 4),)}, "ranks of adapter 'mine' name 'q', which is none of its targets gate, up, down"),
        ({"ranks": (("down", 1.5),)}, "rank of down of adapter 'mine' is 1.5; expected a whole number"),
        ({"rank": 65, "ranks": (("gate", 4), ("up", 4))}, "rank of down of adapter 'mine' is 65; expected at most 64"),
        ({"ranks": (("down", 65),)}, "rank of down of adapter 'mine' is 65; expected at most 64, its larger width"),
        ({"rank": 65, "targets": ("router",)}, "rank of router of adapter 'mine' is 65; expected at most 64"),
        ({"ranks": (("up", 4),)}, "are 16 for gate and 4 for up, which share one A in the fused layout"),
    ],
)
def test_a_spec_that_cannot_be_trained_is_refused(fields, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        AdapterSpec(**fields).check("mine", SITES)


def test_alpha_is_twice_the_rank_where_none_is_given():
    spec = AdapterSpec(rank=8, layout="per-expert", ranks=(("down", 4),))
    assert (spec.scale_of("gate"), spec.scale_of("down")) == (2.0, 4.0)
    assert replace(spec, alpha=8.0).scale_of("gate") == 1.0


def test_specs_that_can_be_trained_pass():
    for name, spec in SPECS.items():
        spec.check(name, SITES)
    AdapterSpec(ranks=(("gate", 4), ("up", 4), ("down", 4))).check("mine", SITES)
    AdapterSpec(layout="per-expert", ranks=(("up", 4),)).check("mine", SITES)


@pytest.mark.slow
def test_logits_are_those_of_the_same_adapters_in_a_served_bank():
    params = new_params(trained=True)
    batch = task_batch([*SPECS, None], 0, 8)
    served = create_bank(SITES, len(SPECS), 32, None, "float32")
    for slot, adapter in enumerate(adapters_of(params).values()):
        served = insert(served, slot, adapter)

    inputs = batch.tokens, batch.positions, batch.segments, batch.slots
    logits = jax.jit(partial(decoder.packed_logits, config=CONFIG))

    @jax.jit
    def training(params, model):
        bank = training_bank(params, SPECS, SITES, CONFIG.num_layers)
        return decoder.packed_logits(model, bank, *inputs, config=CONFIG)

    expected, base = (logits(model(), bank, *inputs) for bank in (served, None))
    real = np.asarray(batch.segments) > 0
    assert_close(np.asarray(training(params, model()))[real], np.asarray(expected)[real], 1e-6)
    for slot in range(len(SPECS)):
        mine = np.asarray(batch.slots) == slot
        change = np.asarray(expected)[mine] - np.asarray(base)[mine]
        assert np.linalg.norm(change) > 1e-2 * np.linalg.norm(base[mine]), "the adapter changes nothing"


@pytest.mark.slow
def test_a_matrix_takes_its_pages_once_however_many_share_it():
    bank = training_bank(new_params(), SPECS, SITES, CONFIG.num_layers)
    pages = {name: pool.shape[0] for name, pool in bank.pools[0].items()}
    # The page of zeros; 8 of `upper`; of `reverse`, 8 of two pages for gate and 8 for up; of `sort`, one for each.
    assert pages["gate_up.a"] == 1 + 8 + (16 + 8) + 2
    assert pages["down.b"] == 1 + 8 + 16 + 1
    assert pages["router.a"] == pages["router.b"] == 2
    assert pages["q.a"] == 3
    layer = bank.layer(0)
    assert layer["gate"].a is layer["up"].a
    upper = np.asarray(layer["gate"].table)[0, :, 0], np.asarray(layer["up"].table)[0, :, 0]
    np.testing.assert_array_equal(*upper)
    assert len(set(np.asarray(layer["gate"].table)[2, :, 0])) == 1
    assert not np.asarray(layer["router"].table)[[0, 2]].any()
    assert all(not np.asarray(pool[0]).any() for pool in bank.pools[0].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_what_is_written_is_read_back_as_the_same_params(name, tmp_path):
    spec = SPECS[name]
    params = new_params(trained=True)[name]
    adapter = to_adapter(params, spec, SITES, name, {"base_model_name_or_path": "demo"})
    notes = write_adapter(adapter, tmp_path / name, SITES, ADAPTER_NAMES, WRITTEN_AS[spec.layout])
    assert notes == []
    read = read_adapter(tmp_path / name, SITES, ADAPTER_NAMES)
    assert read.source["base_model_name_or_path"] == "demo"
    again, found = from_adapter(read, SITES)
    assert {*found.targets} == {*spec.targets}
    assert found.layout == spec.layout
    for module in spec.targets:
        assert found.rank_of(module) == spec.rank_of(module)
        assert np.float32(found.scale_of(module)) == np.float32(spec.scale_of(module))
    assert same_bits(dict(sorted(params.items())), dict(sorted(again.items())))


@pytest.mark.parametrize("layout", WRITTEN_AS)
def test_every_layout_can_be_written_for_peft(layout, tmp_path):
    spec = AdapterSpec(rank=3, alpha=7, layout=layout, rank_stabilised=True, targets=ALL)
    adapter = to_adapter(new_params({"one": spec}, trained=True)["one"], spec, SITES, "one")
    write_adapter(adapter, tmp_path / "one", SITES, ADAPTER_NAMES, "peft", expand=True)
    read = read_adapter(tmp_path / "one", SITES, ADAPTER_NAMES)
    for key, weights in adapter.weights.items():
        for expert in range(len(weights.ranks)):
            assert_close(read.weights[key].delta(expert), weights.delta(expert), 1e-6)


def test_an_adapter_that_no_spec_describes_is_refused():
    spec = AdapterSpec(rank=4)
    whole = to_adapter(new_params({"one": spec}, trained=True)["one"], spec, SITES, "one")

    def with_weights(key, **fields):
        return {**whole.weights, key: replace(whole.weights[key], **fields)}

    cases = {
        "layer 1, down: it, or one of its experts, is missing": {
            key: w for key, w in whole.weights.items() if key != (1, "down")
        },
        "layer 2, up: its experts or layers have several ranks or scales": with_weights(
            (2, "up"), scale=np.full(8, 3, np.float32)
        ),
        "follow from no single alpha": {
            key: replace(w, scale=w.scale * 2) if key[1] == "down" else w for key, w in whole.weights.items()
        },
        "layer 0, down: its A is": with_weights((0, "down"), a=whole.weights[0, "down"].a[:1]),
        "targets nothing that this model has": {},
    }
    for message, weights in cases.items():
        with pytest.raises(InputError, match=message):
            from_adapter(LoRAAdapter("one", weights), SITES)


def test_token_losses_are_the_negative_log_probabilities():
    rng = np.random.default_rng(0)
    logits, targets = 5 * rng.standard_normal((2, 3, 7)), rng.integers(0, 7, (2, 3))
    wide = logits - logits.max(-1, keepdims=True)
    expected = -np.take_along_axis(wide - np.log(np.exp(wide).sum(-1, keepdims=True)), targets[..., None], -1)[..., 0]
    found = token_losses(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)


def test_a_slot_s_sum_holds_nothing_of_other_slots():
    values = jnp.asarray([[1.0, jnp.nan, 3.0], [jnp.inf, 5.0, 7.0]])
    slots = jnp.asarray([[0, 2, 0], [-1, 3, 9]])
    np.testing.assert_array_equal(np.asarray(slot_sums(values, slots, 4)), [4, 0, np.nan, 5])


def test_router_loss_of_a_slot_does_not_see_other_slots():
    rng = np.random.default_rng(0)
    scores = tuple(draw(rng, (12, 8), 1.0) for _ in range(2))
    slots = jnp.asarray([0, 1, 1, 0, -1, 3, 0, 1, 0, 0, 1, 1])
    mine = np.asarray(slots) == 1
    alone = load_balancing(tuple(s[mine] for s in scores), slots[mine], 3, ROUTED)
    others = tuple(jnp.where(jnp.asarray(mine)[:, None], s, jnp.nan) for s in scores)
    together = load_balancing(others, slots, 3, ROUTED)
    np.testing.assert_allclose(together[1], alone[1], rtol=1e-6)
    assert np.isnan(together[0])
    assert together[2] == 0


@pytest.mark.parity
def test_router_loss_is_that_of_transformers():
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    rng = np.random.default_rng(0)
    scores = [rng.standard_normal((30, 8)).astype(np.float32) for _ in range(3)]
    mask = rng.random((2, 15)) < 0.7
    expected = load_balancing_loss_func(tuple(map(torch.tensor, scores)), 8, 3, torch.tensor(mask).long())
    slots = jnp.asarray(np.where(mask.ravel(), 1, -1), jnp.int32)
    found = load_balancing(tuple(map(jnp.asarray, scores)), slots, 2, replace(ROUTED, top_k=3))
    np.testing.assert_allclose(np.asarray(found), [0, float(expected)], rtol=1e-6)
