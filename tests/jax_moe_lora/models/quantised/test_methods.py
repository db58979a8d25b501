"""What published configs say of their quantisation is read, and what would change weights is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.quantised.methods import read_quantisation
from jax_moe_lora.models.quantised.settings import Quantisation
from support.checkpoints import TINY

INT4_FORMS = ("int4_packed_zero", "int4_packed")
FP8_FORMS = ("fp8_inverse", "fp8_stacked", "fp8")
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MINIMAX = DEEPSEEK | {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
GPT_OSS = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}
WEIGHTS = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": 32,
    "num_bits": 4,
    "observer": "minmax",
    "observer_kwargs": {},
    "strategy": "group",
    "symmetric": True,
    "type": "int",
}
GROUP = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": WEIGHTS}
KIMI = {
    "config_groups": {"group_0": GROUP},
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
NVFP4 = {
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
    },
    "ignore": ["lm_head"],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quant_method": "modelopt",
}
AWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": ["gate"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
GPTQ = {
    "bits": 4,
    "checkpoint_format": "gptq",
    "damp_percent": 0.1,
    "desc_act": False,
    "group_size": 128,
    "quant_method": "gptq",
    "sym": True,
    "true_sequential": True,
}


def read(settings: Any, **others: Any) -> Quantisation | None:
    return read_quantisation(Fields({"quantization_config": settings, **others}, "config.json"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (DEEPSEEK, Quantisation("fp8", FP8_FORMS, (128, 128))),
        (
            MINIMAX,
            Quantisation("fp8", FP8_FORMS, (128, 128), ignored=(*MINIMAX["modules_to_not_convert"],)),
        ),
        (GPT_OSS, Quantisation("mxfp4", ("mxfp4",), ignored=(*GPT_OSS["modules_to_not_convert"],))),
        (KIMI, Quantisation("compressed-tensors", INT4_FORMS, group=32, ignored=(*KIMI["ignore"],))),
        (NVFP4, Quantisation("modelopt", ("nvfp4",), ignored=("lm_head",))),
        (AWQ, Quantisation("awq", ("awq",), group=128, ignored=("gate",))),
        (GPTQ, Quantisation("gptq", ("gptq",), group=128)),
        (GPTQ | {"group_size": -1}, Quantisation("gptq", ("gptq",), group=0)),
        (None, None),
        ({}, None),
    ],
)
def test_a_published_config_is_read(settings: Any, expected: Quantisation | None) -> None:
    assert read(settings) == expected


def with_weights(**changes: Any) -> dict[str, Any]:
    return KIMI | {"config_groups": {"group_0": GROUP | {"weights": WEIGHTS | changes}}}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("fp8", "says"),
        ({"quant_method": "hqq"}, "says 'hqq'; supported are fp8, mxfp4"),
        ({"quant_method": 3}, "supported are fp8, mxfp4"),
        (DEEPSEEK | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (DEEPSEEK | {"weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
        (DEEPSEEK | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        (DEEPSEEK | {"mystery": 3}, "mystery = 3"),
        (DEEPSEEK | {"modules_to_not_convert": "gate"}, "modules_to_not_convert is 'gate'"),
        (with_weights(num_bits=2), "num_bits 2, supported are"),
        (with_weights(actorder="group"), "actorder is 'group'.*act-order"),
        (with_weights(dynamic=True), "dynamic is True"),
        (with_weights(strategy="block", block_structure="8x1"), "block_structure is '8x1'"),
        (KIMI | {"format": "marlin-24"}, "format is 'marlin-24'"),
        (KIMI | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (KIMI | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        (KIMI | {"config_groups": {}}, "config_groups is {}"),
        (NVFP4 | {"quant_algo": "W4A8"}, "quant_algo is 'W4A8'"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (GPTQ | {"desc_act": True}, "desc_act is True.*act-order"),
        (GPTQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"dynamic": {"-:.*gate": {}}}, "dynamic is"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(settings)


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "hqq", "aqlm", "auto-round", "quanto", "torchao", "quark", "fbgemm_fp8", "FP8", " fp8", ""],
)
def test_a_method_that_is_not_read_is_named_with_those_that_are(method: str) -> None:
    said = method or "unknown"
    with pytest.raises(ConfigError, match=rf"quantization_config says '{said}'; supported are fp8, mxfp4, .*gptq"):
        read({"quant_method": method, "bits": 4})


@pytest.mark.parametrize("settings", [{"bits": 4}, {"quant_method": None}, {"quant_method": ["fp8"]}, [1], 8, True])
def test_settings_without_a_method_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config says .*supported are fp8"):
        read(settings)


def test_what_groups_of_compressed_tensors_say_limits_the_forms() -> None:
    def forms(**weights: Any) -> tuple[Any, Any]:
        found = read(with_weights(**weights))
        assert found is not None
        return found.forms, found.group

    assert forms(symmetric=False) == (("int4_packed_zero",), 32)
    assert forms(strategy="channel", group_size=None) == (INT4_FORMS, 0)
    assert forms(strategy=["channel"]) == (INT4_FORMS, None)
    one, other = (GROUP | {"weights": WEIGHTS | {"group_size": size}} for size in (32, 128))
    both = read(KIMI | {"config_groups": {"group_0": one, "group_1": other}})
    assert both is not None
    assert both.group is None
    fp4 = with_weights(type="float", strategy="group")
    for written, found in (("mxfp4", ("mxfp4_packed",)), ("nvfp4", ("nvfp4_packed",))):
        settings = read(fp4 | {"format": f"{written}-pack-quantized"})
        assert settings is not None
        assert settings.forms == found


def test_two_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantization_config says 'fp8'"):
        read(DEEPSEEK, compression_config=KIMI)


BESIDE = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.self_attn*"],
    },
}
NVFP4_BESIDE = Quantisation("modelopt", ("nvfp4",), ignored=("lm_head", "model.layers.0.self_attn*"))
FP8_WITHIN = Quantisation("fp8", FP8_FORMS, (128, 128))


@pytest.mark.parametrize(
    ("beside", "within", "expected"),
    [
        (BESIDE, {}, NVFP4_BESIDE),
        (BESIDE, {"quantization_config": DEEPSEEK}, FP8_WITHIN),
        ({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, {}, None),  # of the cache alone
    ],
)
def test_settings_of_model_optimizer_may_stand_in_a_file_of_their_own(
    tmp_path: Path, beside: Any, within: Any, expected: Quantisation | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | within))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert read_model_config(tmp_path).quantisation == expected


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"quantization": 3}, "hf_quant_config.json has quantization 3; expected an object"),
        ({"quantization": {"quant_algo": "W4A8_AWQ"}}, "W4A8_AWQ"),
        ({"quantization": {"quant_algo": "FP8", "mystery": 3}}, "mystery = 3"),
        ({}, "has quantization None"),
    ],
)
def test_a_file_of_model_optimizer_that_is_not_understood_is_refused(tmp_path: Path, beside: Any, named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    with pytest.raises(ConfigError, match=named):
        read_model_config(tmp_path)
