"""What a bank holds comes back out of it, bit for bit, and what is one matrix in it is one again."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_moe_lora import AdapterBank, InputError, LoRAAdapter, create_bank, extract, insert, remove
from jax_moe_lora.adapters import updates
from jax_moe_lora.adapters.lora import LoRAWeights
from jax_moe_lora.nn import moe_sites
from support.layers import LAYOUTS, Spec, random_adapter

SPEC = Spec(hidden=64, width=48, experts=4, top_k=2)


def adapter(layout: str = "per_expert", rank: int = 20) -> LoRAAdapter:
    return random_adapter(SPEC, layout, rank, np.random.default_rng(rank))


def full_bank(*adapters: LoRAAdapter, dtype: Any = "float32") -> AdapterBank:
    """Every page was another adapter's before, and has the rest of it where nothing was written since."""
    bank = create_bank(moe_sites(SPEC.config), len(adapters), 48, None, dtype)
    for slot in range(len(adapters)):
        bank = insert(bank, slot, adapter(rank=48))
    for slot, own in enumerate(adapters):
        bank = insert(remove(bank, slot), slot, own)
    return bank


def assert_extracted(bank: AdapterBank, slot: int, given: LoRAAdapter, dtype: Any = np.float32) -> None:
    found = extract(bank, slot, "mine")
    assert found.name == "mine"
    assert set(found.weights) == {key for key, weights in given.weights.items() if weights.max_rank}
    for key, own in found.weights.items():
        rank = given.weights[key].max_rank
        a, b = given.weights[key].a[:, :rank], given.weights[key].b[:, :, :rank]
        beyond = np.arange(rank) >= given.weights[key].ranks[:, None]  # of each expert's own rank: zero
        a = a if len(a) == 1 else np.where(beyond[:, :, None], 0, a)
        b = b if len(b) == 1 else np.where(beyond[:, None], 0, b)
        assert own.a.dtype == own.b.dtype == dtype
        np.testing.assert_array_equal(own.a, a.astype(dtype))
        np.testing.assert_array_equal(own.b, b.astype(dtype))
        np.testing.assert_array_equal(own.ranks, given.weights[key].ranks)
        np.testing.assert_array_equal(own.scale, np.where(own.ranks > 0, given.weights[key].scale, 0))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_layout_comes_back_with_its_bits(monkeypatch, dtype):
    """Chunks smaller than an adapter, and other adapters around it."""
    monkeypatch.setattr(updates, "CHUNK_BYTES", 3 * 16 * 64 * np.dtype(dtype).itemsize)
    given = [adapter(layout, rank) for layout, rank in zip(LAYOUTS, (4, 16, 40, 20, 17), strict=True)]
    bank = full_bank(*given, dtype=np.dtype(dtype))
    for slot, own in enumerate(given):
        assert_extracted(bank, slot, own, dtype)


def test_shared_and_aliased_matrices_stay_one():
    bank = full_bank(adapter("fused"), adapter("shared_outer"))
    fused, shared = extract(bank, 0, "fused").weights, extract(bank, 1, "shared").weights
    assert fused[0, "gate"].a is fused[0, "up"].a
    assert fused[0, "gate"].b is not fused[0, "up"].b
    assert [len(shared[0, m].a) for m in ("gate", "up", "down")] == [1, 1, 4]
    assert [len(shared[0, m].b) for m in ("gate", "up", "down")] == [4, 4, 1]
    assert shared[0, "gate"].a is not shared[0, "up"].a


def test_experts_keep_their_own_ranks_and_scales():
    ranks = np.array([20, 0, 16, 3], np.int32)
    scale = np.array([1, 9, 0.3, 7], np.float32)
    weights = {key: replace(w, ranks=ranks, scale=scale) for key, w in adapter().weights.items()}
    one_left = LoRAWeights(weights[0, "gate"].a, weights[0, "gate"].b, ranks * [0, 0, 1, 0], scale)
    given = LoRAAdapter("given", {**weights, (0, "gate"): one_left})
    assert_extracted(full_bank(given), 0, given)


def test_what_is_extracted_can_be_inserted_again():
    bank = full_bank(adapter("shared_outer"), adapter("fused"))
    again = insert(remove(bank, 1), 1, extract(bank, 0, "again"))
    assert again.slot_nbytes(1) == again.slot_nbytes(0)
    assert_extracted(again, 1, adapter("shared_outer"))


def test_an_empty_slot_holds_nothing_and_one_out_of_range_is_refused():
    bank = full_bank(adapter())
    assert extract(remove(bank, 0), 0, "nobody").weights == {}
    with pytest.raises(InputError, match="Slot is 1; the bank has slots 0 to 0"):
        extract(bank, 1, "nobody")
