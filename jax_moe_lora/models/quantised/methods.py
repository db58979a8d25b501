"""`quantization_config` by method: which forms a checkpoint may have, and what would change its numbers.

Settings of how activations and caches are quantised are passed over: rows stay in 16 bits here. Anything else that is
not understood is refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jax_moe_lora.models.fields import QUANTISED, Fields
from jax_moe_lora.models.quantised.settings import Quantisation

_COMMON = (
    "quant_method",
    "quant_algo",
    "dequantize",
    "format",
    "version",
    "quantization_status",
    "transformers_version",
)
_IGNORED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


def _fp8(fields: Fields) -> Quantisation:
    fields.expect("fmt", (None, "e4m3", "float8_e4m3fn"), "only e4m3 is supported")
    fields.expect("expert_dtype", (None, "fp8"), "only fp8 experts are supported")
    fields.expect("modules_to_convert", (None, []), "only linear layers are supported")
    fields.expect("scale_fmt", (None, "float", "ue8m0"), "only float and ue8m0 are supported")
    block = fields.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and 1 <= n <= 65_536 for n in block)
    ):
        raise fields.error(f"weight_block_size is {block!r}, two whole numbers were expected", "weight_block_size")
    return Quantisation("fp8", ("fp8_inverse", "fp8_stacked", "fp8"), None if block is None else (block[0], block[1]))


def _mxfp4(fields: Fields) -> Quantisation:
    return Quantisation("mxfp4", ("mxfp4",))


def _group(fields: Fields, name: str) -> int:
    """Columns that share a scale, 0 for all of a row (-1 in files)."""
    value = fields.get(name, 128)
    if isinstance(value, bool) or not isinstance(value, int) or (value != -1 and value < 2):
        raise fields.error(f"{name} is {value!r}, -1 or a whole number of at least 2 was expected", name)
    return max(value, 0)


def _awq(fields: Fields) -> Quantisation:
    for name in ("bits", "w_bit"):
        fields.expect(name, (None, 4), "only 4 bits are supported")
    fields.expect("zero_point", (None, True), "only weights with zero points are supported")
    fields.expect("version", (None, "gemm", "GEMM"), "only the layout 'gemm' is supported")
    name = "group_size" if fields.get("q_group_size") is None else "q_group_size"
    return Quantisation("awq", ("awq",), group=_group(fields, name))


def _gptq(fields: Fields) -> Quantisation:
    fields.expect("bits", (4,), "only 4 bits are supported")
    fields.expect("desc_act", (None, False), "columns in another order (act-order) are not supported")
    fields.expect("dynamic", (None, {}), "settings by module are not supported")
    fields.expect("checkpoint_format", (None, "gptq", "gptq_v2"), "supported are gptq and gptq_v2")
    return Quantisation("gptq", (fields.get("checkpoint_format", "gptq"),), group=_group(fields, "group_size"))


def _modelopt(fields: Fields) -> Quantisation:
    algorithms = {"FP8": ("fp8",), "NVFP4": ("nvfp4",)}
    return Quantisation("modelopt", fields.choice("quant_algo", algorithms))


_SCHEMES = {
    ("float", 8): ("fp8",),
    ("int", 4): ("int4_packed_zero", "int4_packed"),
    ("float", 4): ("nvfp4_packed", "mxfp4_packed"),
}
_FORM_OF_FORMAT = {"nvfp4-pack-quantized": "nvfp4_packed", "mxfp4-pack-quantized": "mxfp4_packed"}
_FORMATS = (
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)


def _compressed_tensors(fields: Fields) -> Quantisation:
    fields.expect("format", (None, *_FORMATS), f"supported are {', '.join(_FORMATS)}")
    for name in ("sparsity_config", "transform_config"):
        fields.expect(name, (None, {}), "it changes weights, and is not supported")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise fields.error(f"config_groups is {groups!r}, an object of objects was expected", "config_groups")
    found = [_weights(fields, name, group.get("weights")) for name, group in groups.items()]
    blocks, sizes = {one.block for one in found}, {one.group for one in found}
    if len(blocks) > 1:
        raise fields.error("config_groups have blocks of several sizes, which are not supported", "config_groups")
    return Quantisation(
        "compressed-tensors",
        tuple(dict.fromkeys(form for one in found for form in one.forms)),
        block=blocks.pop(),
        group=sizes.pop() if len(sizes) == 1 else None,
    )


class _Weights(NamedTuple):
    """What one of `config_groups` says.

    Attributes:
      forms: that its matrices may have.
      block: rows and columns that share a scale of fp8; None where shapes say.
      group: columns that share a scale of int4, 0 for all; None where shapes say.
    """

    forms: Sequence[str]
    block: tuple[int, int] | None = None
    group: int | None = None


def _weights(fields: Fields, name: str, weights: Any) -> _Weights:
    """What a group says of its weights."""
    where = f"{fields.source}, config_groups.{name}.weights"
    if not isinstance(weights, Mapping):
        raise fields.error(f"config_groups.{name}.weights is {weights!r}, an object was expected", "config_groups")
    own = Fields(weights, where)
    kind, bits = own.get("type", "int"), own.get("num_bits")
    forms = _SCHEMES.get((kind, bits)) if isinstance(kind, str) and isinstance(bits, int) else None
    if forms is None:
        raise own.error(
            f"type is {kind!r} with num_bits {bits!r}, supported are float 8, int 4 and float 4", "num_bits"
        )
    own.expect("dynamic", (None, False), "weights whose scales are not stored are not supported")
    own.expect("actorder", (None, False, "static", "weight"), "columns in another order (act-order) are not supported")
    strategy, block = own.get("strategy"), own.get("block_structure")
    symmetric, packed = own.get("symmetric"), _FORM_OF_FORMAT.get(fields.get("format"))
    if strategy == "block":
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise own.error(f"block_structure is {block!r}, two whole numbers were expected", "block_structure")
        return _Weights(forms, (block[0], block[1]))
    if kind == "int":
        group = _group(own, "group_size") if strategy == "group" else None
        return _Weights(forms[:1] if symmetric is False else forms, group=0 if strategy == "channel" else group)
    return _Weights((packed,) if packed in forms else forms)


METHODS: Mapping[str, Callable[[Fields], Quantisation]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
}
_ANY_VALUE: Mapping[str, tuple[str, ...]] = {
    "fp8": ("activation_scheme",),
    "compressed-tensors": ("kv_cache_scheme", "global_compression_ratio", "provider"),
    "modelopt": ("producer", "kv_cache_scheme", "kv_cache_quant_algo", "config_groups", "group_size", "has_zero_point"),
    "awq": ("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"),
    "gptq": (
        "sym",
        "damp_percent",
        "damp_auto_increment",
        "true_sequential",
        "static_groups",
        "lm_head",
        "meta",
        "dataset",
        "model_name_or_path",
        "model_file_base_name",
        "model_seqlen",
        "block_name_to_quantize",
        "tokenizer",
        "max_input_length",
        "module_name_preceding_first_block",
        "pad_token_id",
        "use_cuda_fp16",
        "use_exllama",
        "exllama_config",
        "pack_dtype",
        "cache_block_outputs",
        "modules_in_block_to_quantize",
        "batch_size",
        "backend",
        "disable_exllama",
        "hyb_act",
        "act_group_aware",
    ),
}


def read_quantisation(fields: Fields) -> Quantisation | None:
    """What a config says of how its checkpoint is quantised; None where it is not.

    Args:
      fields: the config's.

    Raises:
      ConfigError: a method, or a setting that changes weights, which is not supported or not understood, by name.
    """
    present = {name: value for name in QUANTISED if (value := fields.get(name)) not in (None, False, {}, "")}
    if not present:
        return None
    name, settings = next(iter(present.items()))
    said = settings if isinstance(settings, Mapping) else {}
    method = said.get("quant_method")
    if len(present) > 1 or name == "quantization" or not isinstance(method, str) or method not in METHODS:
        found = next(
            (said[key] for key in ("quant_method", "quant_algo", "format", "mode") if said.get(key)), "unknown"
        )
        raise fields.error(
            f"{name} says {found!r}; supported are {', '.join(METHODS)}: load another form, or the bfloat16 one", name
        )
    own = Fields(said, f"{fields.source}, {name}", any_value=(*_COMMON, *_ANY_VALUE.get(method, ())))
    quantisation = replace(METHODS[method](own), ignored=_ignored(own))
    own.refuse_unknown()
    return quantisation


def _ignored(fields: Fields) -> tuple[str, ...]:
    """The modules that a config says are not quantised, under whichever name."""
    names: list[str] = []
    for name in _IGNORED:
        value = fields.get(name, [])
        if not isinstance(value, list) or not all(isinstance(module, str) for module in value):
            raise fields.error(f"{name} is {value!r}, a list of modules was expected", name)
        names += value
    return tuple(dict.fromkeys(names))
