"""The whole model's benchmark on a CPU: what it writes, that its bank is a real one, and what it refuses."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.model_floor import floor_s
from jax_moe_lora.benchmark.models import MODELS, model_config
from jax_moe_lora.benchmark.random_model import Case, draw_slots, param_shapes, random_bank, random_params, sites_of
from jax_moe_lora.cli.bench_model import bench_model
from jax_moe_lora.cli.options import MODEL_HELP, result_file
from jax_moe_lora.mesh.scaling.costs import quantised_bytes
from jax_moe_lora.models.config_file import parse_model_config
from jax_moe_lora.models.quantised.for_kernels import pack_experts
from jax_moe_lora.models.quantised.schemes import quantised_formats
from pallas_kernels import backend
from pallas_kernels.ops import quantise
from pallas_kernels.quantised.format import FP8_BLOCK, MXFP4
from pallas_kernels.specs import ADAPTERS

H200 = Ceilings(bytes_per_s=4.3e12, flop_per_s=790e12)
TINY = {"model": "tiny", "layers": 1, "adapters": ["s8r16"], "context": 4, "cache_length": 8, "steps": 2}


@pytest.mark.slow
def test_bench_model_writes_a_row_a_case_and_how_it_was_measured(tmp_path):
    bench_model(**TINY, quantise="fp8", targets="all", decode=[3], prefill=["2x8"], out=tmp_path / "some" / "cpu")
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
        assert row["quantise"] == "fp8"


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


def test_the_floor_counts_what_each_kind_of_layer_reads():
    def at(name: str, length: int) -> float:
        return floor_s(Case("decode", 128, length, length + 1, "none"), model_config(name), None, H200)

    # gpt-oss: half of its layers read a window of 128 and no more; 2 x 8 heads of 64, 2 bytes.
    grown = at("gpt-oss-20b", 1128) - at("gpt-oss-20b", 128)
    assert grown == pytest.approx(12 * 128 * 1000 * 2 * 8 * 64 * 2 / 4.3e12, rel=1e-6)
    # Qwen3.5: three quarters of its layers keep a state, whatever the length is; 2 x 2 heads of 256.
    grown = at("qwen3.5-35b-a3b", 1128) - at("qwen3.5-35b-a3b", 128)
    assert grown == pytest.approx(10 * 128 * 1000 * 2 * 2 * 256 * 2 / 4.3e12, rel=1e-6)


def test_fewer_layers_are_the_first_ones_and_more_repeat_them():
    whole = model_config("qwen3.5-35b-a3b")
    assert model_config("qwen3.5-35b-a3b", 6).layers == whole.layers[:6]
    assert model_config("gpt-oss-20b", 26).layers == (model_config("gpt-oss-20b").layers * 2)[:26]


def test_a_folder_with_a_config_is_a_model_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["tiny"]))
    assert model_config(str(tmp_path)) == model_config("tiny")


def test_the_help_names_every_model():
    assert all(name in MODEL_HELP for name in MODELS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "huge"}, "model is 'huge'"),
        ({"adapters": ["many"]}, "adapters is 'many'"),
        ({"targets": "head"}, "targets is 'head'"),
        ({"prefill": ["8"]}, "prefill is '8'; expected REQUESTSxTOKENS"),
        ({"steps": 100}, "do not fit into cache-length 8"),
        ({"peer": ["vllm"]}, "peer is 'vllm'; expected transformers"),
        ({"implementation": "fast"}, "'fast' is unknown"),
    ],
)
def test_bad_options_are_one_sentence(wrong, message):
    with pytest.raises(InputError, match=message):
        bench_model(**TINY | {"targets": "experts", "decode": [1]} | wrong)


@pytest.mark.parametrize(
    ("out", "file"), [("a/qwen3.5-35b", "a/qwen3.5-35b.json"), ("h200.json", "h200.json"), ("h200", "h200.json")]
)
def test_a_name_with_dots_is_kept(out, file):
    assert result_file(Path(out), ".json") == Path(file)


def test_the_floor_counts_the_bytes_of_quantised_weights():
    config = model_config("qwen3-30b-a3b")
    case = Case("decode", 128, 1, 2, "none")
    full = floor_s(case, config, None, H200)
    ratios = {
        scheme: floor_s(case, config, None, H200, quantised_formats(config, scheme, "it")) / full
        for scheme in ("fp8", "int4", "mxfp4")
    }
    # A tenth stays in 16 bits: embedding's rows are not read, the head is.
    assert 0.5 < ratios["fp8"] < 0.52
    assert 0.27 < ratios["mxfp4"] < 0.29  # 4.25 bits
    assert 0.28 < ratios["int4"] < 0.31  # 4.5 bits
    weight = quantise(jnp.ones((3, 160, 96), jnp.bfloat16), FP8_BLOCK)
    assert quantised_bytes((3, 160, 96), FP8_BLOCK) == weight.nbytes
    assert quantised_bytes((3, 160, 96), MXFP4) == quantise(jnp.ones((3, 160, 96)), MXFP4).nbytes


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4", "int4"])
def test_experts_are_packed_where_the_hopper_kernels_run_as_the_compiled_program_expects(scheme, monkeypatch):
    monkeypatch.setattr(backend, "device_capability", lambda: ((9, 0), "compute capability 9.0"))
    raw = MODELS["tiny"] | {"moe_intermediate_size": 128, "num_hidden_layers": 1, "num_experts": 4}
    config = parse_model_config(raw, source="tiny")
    formats = quantised_formats(config, scheme, "tiny")
    params = random_params(config, formats)
    layers = pack_experts(params.layers, "bfloat16")
    shapes = param_shapes(config, formats).layers
    assert layers[0]["gate"].format.layout == "hopper"
    assert jax.tree.structure(layers) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(layers), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
    assert param_shapes(config, formats, "xla").layers[0]["gate"].format.layout == "rows"
