"""Every adapter layout in one batch: logits against PEFT, or against transformers with merged weights."""

import json
import shutil
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, Model
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.inspect import inspect_adapter
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.decoder import adapter_sites
from support.adapter_files import (
    CONFIG,
    EXPERTS_PATH,
    GPT_OSS,
    LAYERS,
    LAYOUTS,
    SIDECAR,
    TINKER,
    TRTLLM,
    WIDTHS,
    D,
    E,
    F,
    Written,
    draw,
    stacks,
    write,
)
from support.layers import assert_close, figures
from support.models import ADAPTER_NAMES
from support.networks import EXPERTS, TINY, peft_logits, save_model, tiny

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("parity")]

ROWS = [*LAYOUTS, None]
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (len(ROWS), 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tiny("qwen3_moe"), tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def written(base, tmp_path_factory) -> dict[str, Written]:
    return {name: make(base, tmp_path_factory.mktemp(name) / "adapter") for name, make in LAYOUTS.items()}


@pytest.fixture(scope="module")
def model(base, written) -> Model:
    """The model with an adapter of every layout, each under its layout's name."""
    model = Model.from_pretrained(base, dtype="float32", max_adapters=len(LAYOUTS), max_rank=128)
    for name, case in written.items():
        folder, sites = case.folder, adapter_sites(model.config)
        own = case.names is ADAPTER_NAMES
        model.load_adapter(folder if own else read_adapter(folder, sites, case.names), adapter_name=name)
    return model


@pytest.fixture(scope="module")
def sites(base) -> dict[str, Site]:
    return adapter_sites(read_model_config(base))


@pytest.fixture(scope="module")
def base_logits(base) -> np.ndarray:
    return peft_logits(base, None, TOKENS)


@pytest.fixture(scope="module")
def mixed(model) -> np.ndarray:
    """Logits of one batch whose rows use every layout, and the base model in the last."""
    return np.asarray(model.logits(TOKENS, ROWS))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mixed_batchs_logits_equal_those_of_another_implementation(written, mixed, base_logits, name):
    row = ROWS.index(name)
    assert_close(mixed[row], written[name].expected(TOKENS[row : row + 1])[0], 1e-5)
    assert figures(mixed[row], base_logits[row])["relative"] > 1e-3, "the adapter changes nothing; this proves nothing"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_mixed_batch_has_the_bits_of_its_solo_run(model, mixed, name):
    """Per-expert, fused, transposed, shared, of rank 4 and 128, attention alone, and base rows: bit for bit."""
    solo = model.logits(TOKENS, [own if own == name else None for own in ROWS])
    np.testing.assert_array_equal(mixed[ROWS.index(name)], solo[ROWS.index(name)])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_is_reported(sites, written, name):
    case = written[name]
    assert read_adapter(case.folder, sites, case.names).layout == case.layout
    assert inspect_adapter(case.folder).layout == case.layout.removesuffix(" of peft up to 0.19.0")


def read(folder: Path, sites: Mapping[str, Site], names: AdapterNames = ADAPTER_NAMES) -> LoRAAdapter:
    return read_adapter(folder, sites, names)


@pytest.mark.parametrize("parts", [TINKER, TRTLLM], ids=["tinker", "trtllm"])
def test_each_of_the_six_sides_is_shared_or_not_by_itself(sites, tmp_path, parts):
    six = list(product(WIDTHS, "AB"))
    for number in range(64):
        shared = {side for bit, side in enumerate(six) if number >> bit & 1}
        matrices = draw(shared)
        adapter = read(write(tmp_path / str(number), stacks(matrices, parts)), sites)
        for (layer, module), (a, b) in matrices.items():
            found = adapter.weights[layer, module]
            assert len(found.a) == (1 if (module, "A") in shared else E)
            assert len(found.b) == (1 if (module, "B") in shared else E)
            for expert in range(E):
                own = 1.5 * (b[expert % len(b)] @ a[expert % len(a)])
                np.testing.assert_allclose(found.delta(expert), own, rtol=1e-6, atol=1e-8)


def test_gate_and_up_that_share_an_a_hold_one_array(sites, written):
    for name in ("peft_3d", "peft_3d_transposed", "peft_converted", "gpt_oss_interleaved", "sglang"):
        weights = read(written[name].folder, sites, written[name].names).weights
        assert all(weights[layer, "gate"].a is weights[layer, "up"].a for layer in LAYERS), name


def test_gpt_oss_is_read_as_peft_merges_it(tmp_path):
    """The real family: parameters `(E, in, out)`, interleaved; peft merges into weights of zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 9}
    config = GptOssConfig(hidden_size=16, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2, **sizes)
    network = GptOssForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(network, LoraConfig(r=2, target_parameters=EXPERTS))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                parameter.copy_(torch.randn_like(parameter) if "lora_" in name else torch.zeros_like(parameter))
        wrapped.save_pretrained(tmp_path)
        experts = wrapped.merge_and_unload().model.layers[0].mlp.experts
    gate_up, down = (p.detach().numpy().swapaxes(1, 2) for p in (experts.gate_up_proj, experts.down_proj))
    sites = {"gate": Site(16, 12, 3, (0,)), "up": Site(16, 12, 3, (0,)), "down": Site(12, 16, 3, (0,))}
    weights = read(tmp_path, sites, GPT_OSS).weights
    for module, expected in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2]), ("down", down)):
        assert expected.any()
        for expert in range(3):
            np.testing.assert_allclose(weights[0, module].delta(expert), expected[expert], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tinker", "sglang", "trtllm_one_matrix"])
def test_a_config_may_name_a_projection_by_the_spelling_of_any_layout(sites, written, tmp_path, name):
    """Also one half of a fused one: gate has its own alpha, up that of the whole config."""
    shutil.copytree(written[name].folder, tmp_path / "adapter")
    fields = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["gate_proj", "w3", "moe_4h_to_h"],
        "alpha_pattern": {"gate_proj": 9},
    }
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(fields))
    weights = read(tmp_path / "adapter", sites).weights
    assert {module: float(weights[0, module].scale[0]) for module in WIDTHS} == {
        "gate": 9 / 4,
        "up": 6 / 4,
        "down": 6 / 4,
    }


def test_the_router_of_tensorrt_llm_is_read(sites, tmp_path):
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape, dtype=np.float32) for shape in ((1, 4, D), (1, E, 4)))
    tensors = {f"{EXPERTS_PATH.format(2)}.moe_router.lora_{side}.weight": m for side, m in (("A", a), ("B", b))}
    router = read(write(tmp_path / "adapter", tensors, target_modules=["gate"]), sites).weights[2, "router"]
    np.testing.assert_allclose(router.delta(0), 1.5 * (b[0] @ a[0]), rtol=1e-6)


def test_a_sidecar_beside_per_expert_matrices_makes_one_matrix_of_equal_ones(sites, tmp_path):
    a, b = draw({("gate", "A")})[0, "gate"]
    tensors = {}
    for expert in range(E):
        path = f"{EXPERTS_PATH.format(0)}.{expert}.gate_proj"
        tensors |= {f"{path}.lora_A.weight": a[0], f"{path}.lora_B.weight": b[expert]}
    folder = write(tmp_path / "adapter", tensors, SIDECAR, target_modules=["gate_proj"])
    gate = read(folder, sites).weights[0, "gate"]
    assert gate.a.shape == (1, 4, D)
    np.testing.assert_allclose(gate.delta(3), 1.5 * (b[3] @ a[0]), rtol=1e-6, atol=1e-8)


GATE = {
    key: tensor
    for key, tensor in stacks(draw({("gate", "A")}), TRTLLM).items()
    if "layers.0" in key and "h_to_4h" in key
}
GATE_A, GATE_B = GATE
COPIES = {**GATE, GATE_A: np.broadcast_to(GATE[GATE_A], (E, 4, D))}
REFUSED = {
    "no_alpha": (GATE, {"lora_alpha": ...}, "lora_alpha is missing"),
    "no_rank": (GATE, {"r": ...}, "r is None"),
    "another_rank": (GATE, {"r": 3}, "it has rank 4, and adapter_config.json says 3"),
    "not_targeted": (GATE, {"target_modules": ["up_proj"]}, r"does not target model\.layers\.0.*moe_h_to_4h"),
    "missing_target": (GATE, {"target_modules": ["w1", "w3"]}, "targets 'w3'.*no weights"),
    "two_dimensions": ({**GATE, GATE_A: GATE[GATE_A][0]}, {}, r"lora_A.*\[4, 64\].*\[1, 4, 64\]"),
    "some_experts": ({**GATE, GATE_B: GATE[GATE_B][:3]}, {}, r"lora_B.*\[3, 24, 4\].*\[8, 24, 4\]"),
    "stacked_halves": (
        {f"{EXPERTS_PATH.format(0)}.gate_up_proj.lora_{side}.weight": np.zeros(shape, np.float32)
         for side, shape in (("A", (1, 8, D)), ("B", (E, 2 * F, 4)))},
        {"r": 8}, r"lora_B.*\[8, 48, 4\].*\[8, 48, 8\]",
    ),
    "unknown_part": ({key.replace("moe_h_to_4h", "w4"): tensor for key, tensor in GATE.items()}, {}, r"w4\.lora_A"),
    "two_layouts": (
        {**GATE, **{key.replace("moe_h_to_4h", "w3"): tensor for key, tensor in GATE.items()}},
        {}, r"w3\.lora_A.*'Tinker' under mlp\.experts.*'TensorRT-LLM'",
    ),
    "sidecar_version": (GATE, {"sidecar": {**SIDECAR, "version": 2}}, r"lora_layout\.json.*version 1"),
    "sidecar_module": (GATE, {"sidecar": {"moe_shared_outer": {"w1": {"shared_side": "A"}}}}, r"lora_layout\.json.*w1"),
    "sidecar_side": (GATE, {"sidecar": {"moe_shared_outer": {"moe_gate": "A"}}}, r"lora_layout\.json.*moe_gate"),
    "sidecar_denies": (GATE, {"sidecar": {"version": 1}}, "side A of gate in layer 0 is one matrix.*not declare"),
    "copies_differ": (
        {**COPIES, GATE_A: COPIES[GATE_A] * np.arange(1, E + 1, dtype=np.float32)[:, None, None]},
        {"sidecar": SIDECAR}, "side A of gate in layer 0 is declared shared, and its experts' matrices differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_servers_file_that_is_not_understood_is_refused_by_name(sites, tmp_path, case):
    tensors, config, message = REFUSED[case]
    folder = write(tmp_path / "adapter", tensors, **config)
    with pytest.raises(AdapterFormatError, match=message) as refused:
        read(folder, sites)
    assert str(folder) in str(refused.value)


def test_inspect_shows_what_all_experts_of_a_stack_share(written):
    shown = {m.module: (m.form, m.shared, m.ranks) for m in inspect_adapter(written["tinker"].folder).modules}
    assert shown == {
        "mlp.experts.w1": ("stack", "A of all experts", [4]),
        "mlp.experts.w2": ("stack", "B of all experts", [4]),
        "mlp.experts.w3": ("stack", "A of all experts", [4]),
    }
