"""The whole model's benchmark on a CPU: what it writes, that its bank is a real one, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.random_model import Case, draw_slots, floor_s, model_config, random_bank, sites_of
from jax_moe_lora.cli.bench_model import bench_model
from pallas_kernels.specs import ADAPTERS

H200 = Ceilings(bytes_per_s=4.3e12, flop_per_s=790e12)
TINY = {"model": "tiny", "layers": 1, "adapters": ["s8r16"], "context": 4, "cache_length": 8, "steps": 2}


@pytest.mark.slow
def test_bench_model_writes_a_row_a_case_and_how_it_was_measured(tmp_path):
    bench_model(**TINY, targets="all", decode=[3], prefill=["2x8"], out=tmp_path / "some" / "cpu")
    about = json.loads((tmp_path / "some" / "cpu.json").read_text())
    assert {"device", "date", "versions", "commands", "method", "rows"} <= about.keys()
    assert [(row["kind"], row["batch"], row["length"]) for row in about["rows"]] == [
        ("decode", 3, 4),
        ("prefill", 2, 8),
    ]
    for row in about["rows"]:
        assert "error" not in row
        assert row["ms"] > 0
        assert row["compile_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["experts", pytest.param("all", marks=pytest.mark.slow)])
def test_the_random_bank_is_a_full_bank_of_the_library(targets):
    """No page has two owners, page 0 is zero, and the sizes are those of a bank made by `create_bank`."""
    sites, spec = sites_of(model_config("tiny"), targets), ADAPTERS["s8r64"]
    bank, real = random_bank(sites, spec), create_bank(sites, spec.slots, max(spec.ranks), None)
    assert jax.tree.structure(bank) == jax.tree.structure(real)
    assert [x.shape for x in jax.tree.leaves(bank)] == [x.shape for x in jax.tree.leaves(real)]
    ids: dict[int, list[np.ndarray]] = {}
    for module, site in sites.items():
        table = np.asarray(bank.tables[module])
        for side, width in enumerate((site.in_width, site.out_width)):
            pages = table[..., side, None] + np.arange(4)
            ids.setdefault(width, []).append(pages.reshape(-1))
            assert (np.asarray(bank.owner[width])[pages] == np.arange(spec.slots)[None, :, None, None]).all()
    for width, some in ids.items():
        assert sorted(np.concatenate(some)) == list(range(1, bank.pages[width].shape[0]))
        assert not bank.pages[width][0].any()
        assert bool(bank.pages[width][1:].any(axis=(1, 2)).all())


def test_slots_go_round_over_adapters_and_the_base_model():
    case = Case("decode", 7, 1, 2, "s2")
    assert draw_slots(case, 2).tolist() == [0, 1, -1, 0, 1, -1, 0]
    assert draw_slots(case, 0).tolist() == [-1] * 7


def test_the_floor_is_that_of_the_weights_at_decode_and_of_the_multiplications_at_prefill():
    config = model_config("qwen3-30b-a3b")
    # 30.5e9 parameters of 2 bytes less the embedding and the experts that nobody meets, at 4.3 TB/s.
    every_expert = floor_s(Case("decode", 128, 1, 2, "none"), config, None, H200)
    assert every_expert == pytest.approx((30.53e9 - 0.311e9) * 2 / 4.3e12, rel=0.02)
    # 3.0e9 active parameters a token less the vocabulary's, two operations each, and causal attention.
    prompt = floor_s(Case("prefill", 1, 8192, 8192, "none"), config, None, H200)
    assert prompt == pytest.approx(8192 * (2 * 2.72e9 + 48 * 4 * 4096 * 4096) / 790e12, rel=0.03)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "huge"}, "model is 'huge'"),
        ({"adapters": ["many"]}, "adapters is 'many'"),
        ({"targets": "head"}, "targets is 'head'"),
        ({"prefill": ["8"]}, "prefill is '8'; expected REQUESTSxTOKENS"),
        ({"steps": 100}, "do not fit into cache-length 8"),
        ({"implementation": "fast"}, "'fast' is unknown"),
    ],
)
def test_bad_options_are_one_sentence(wrong, message):
    with pytest.raises(InputError, match=message):
        bench_model(**TINY | {"targets": "experts", "decode": [1]} | wrong)
