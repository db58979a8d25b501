"""Contract 12, what runs is held: no slot in use is given to another adapter, in loops of one's own too."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import AdapterInUseError, AdapterNameError, BankFullError, InputError, Model, extract
from jax_moe_lora.demo.run import data_folder

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
ADAPTERS = data_folder() / "adapters"


@pytest.fixture
def model() -> Model:
    """One slot, so that a second adapter can only come in the place of the first."""
    model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=1, max_rank=32)
    for name in ("upper", "reverse"):
        model.register_adapter(ADAPTERS / name, name)
    return model


def content(model: Model, slot: int) -> np.ndarray:
    """What a slot holds in the bank of this moment."""
    weights = extract(model.functional(1, 16).bank, slot, "any").weights
    return np.concatenate([weights[key].delta(0).ravel() for key in sorted(weights)])


def test_12_a_held_slot_is_given_to_no_other_adapter(model):
    with model.hold(["upper", None, "upper"]) as slots:
        assert slots.tolist() == [0, -1, 0]
        before = content(model, 0)
        with pytest.raises(AdapterInUseError, match="'upper' is used by 2"):
            model.unload_adapter("upper")
        with pytest.raises(BankFullError, match="the rest used by running requests of this thread itself"):
            model.load_adapter(ADAPTERS / "sort", "sort")
        np.testing.assert_array_equal(content(model, 0), before)
    model.unload_adapter("upper")
    with model.hold(["reverse"]) as slots:
        assert slots.tolist() == [0]
        assert not np.array_equal(content(model, 0), before)


def test_12_acquired_slots_are_held_until_each_is_released(model):
    slots = model.acquire(["upper", None, "upper"])
    model.release(slots[:2])
    with pytest.raises(AdapterInUseError, match="'upper' is used by 1"):
        model.unload_adapter("upper")
    release = threading.Thread(
        target=model.release, args=([int(slots[2])],)
    )  # another thread than the one that acquired
    release.start()
    release.join()
    model.unload_adapter("upper")
    assert model.acquire(["reverse"]).tolist() == [0]  # this thread holds nothing any more, so it is not refused


def test_what_is_not_acquired_is_not_released(model):
    slots = model.acquire(["upper"])
    for wrong, message in (
        ([0, 0], "acquired 1 times and released 2"),
        ([3], "acquired 0"),
        (["upper"], "whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            model.release(wrong)
    with pytest.raises(AdapterInUseError):  # nothing was released
        model.unload_adapter("upper")
    model.release(slots)
    with model.hold(["upper"]), pytest.raises(InputError, match="acquired 0 times"):
        model.release(0)  # another's
    model.release(-1)


def test_an_adapter_that_cannot_be_loaded_leaves_nothing_held(model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    model.register_adapter(tmp_path, "broken")
    for hold in (model.acquire, lambda names: model.hold(names).__enter__()):
        with pytest.raises(ValueError, match="adapter_config"):
            hold(["broken"])
    assert model.acquire(["upper"]).tolist() == [0]


def test_a_lent_bank_keeps_its_own_slots(model):
    model.load_adapter(ADAPTERS / "sort", "sort")
    fn = model.functional(1, 16)
    model.unload_adapter("sort")
    model.load_adapter(ADAPTERS / "upper", "other")
    assert fn.slots(["sort", None, "__base__"]).tolist() == [0, -1, -1]
    with pytest.raises(AdapterNameError, match=r"'other' is in this bank \(there are: sort\)"):
        fn.slots(["other"])


@pytest.mark.parametrize("slot", [1, -2, 10**6])
def test_6_slots_out_of_range_are_refused_before_anything_runs(model, slot):
    fn = model.functional(1, 16)
    one, ids, slots = jnp.ones(1, jnp.int32), jnp.ones((1, 4), jnp.int32), jnp.asarray([slot])
    with pytest.raises(InputError, match=rf"slots has {slot}; expected -1 \(the base model\) to 0"):
        fn.prefill(fn.params, fn.bank, fn.init_cache(), ids, one, slots)
    with pytest.raises(InputError, match=rf"slots has {slot}"):
        fn.decode(fn.params, fn.bank, fn.init_cache(), one, slots)
