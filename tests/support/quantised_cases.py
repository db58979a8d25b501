"""Published forms of quantised checkpoints: what a config says, who writes a matrix, and what it is read as."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from support import quantised_files as files
from support.checkpoints import TINY, expected_shapes

RAW = TINY | {"hidden_size": 64, "moe_intermediate_size": 48, "intermediate_size": 96, "head_dim": 16}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True, "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed(weights: dict[str, Any], format: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


@dataclass(frozen=True)
class Case:
    """A form: what the config says, who writes a matrix, and the format that it is read as."""

    settings: dict[str, Any]
    writer: Callable[[np.ndarray], files.Written]
    format: str


def zeros(matrix: np.ndarray) -> files.Written:
    return files.int4_packed(matrix, zeros=True)


def gptq_v2(matrix: np.ndarray) -> files.Written:
    return files.gptq(matrix, first_format=False)


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": False}
CASES = {
    "fp8": Case(BLOCKS, files.fp8_block, "fp8_block"),
    "fp8 channel": Case(compressed(FP8, "float-quantized"), files.fp8_channel, "fp8_channel"),
    "fp8 tensor": Case(compressed(FP8 | {"strategy": "tensor"}, "float-quantized"), files.fp8_tensor, "fp8_tensor"),
    "int4": Case(compressed(INT4, "pack-quantized"), files.int4_packed, "int4"),
    "int4 zero points": Case(compressed(INT4 | {"symmetric": False}, "pack-quantized"), zeros, "int4_zero"),
    "nvfp4": Case(compressed(FP4, "nvfp4-pack-quantized"), files.nvfp4_packed, "nvfp4"),
    "mxfp4": Case(compressed(MXFP4, "mxfp4-pack-quantized"), files.mxfp4_packed, "mxfp4"),
    "modelopt fp8": Case({"quant_method": "modelopt", "quant_algo": "FP8"}, files.fp8_tensor, "fp8_tensor"),
    "modelopt nvfp4": Case({"quant_method": "modelopt", "quant_algo": "NVFP4"}, files.nvfp4_modelopt, "nvfp4"),
    "awq": Case({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}, files.awq, "int4_zero"),
    "gptq": Case(GPTQ, files.gptq, "int4_zero"),
    "gptq v2": Case(GPTQ | {"checkpoint_format": "gptq_v2"}, gptq_v2, "int4_zero"),
}


def raw_for(name: str) -> dict[str, Any]:
    """The config; groups of 32 divide wider experts."""
    return RAW | {"moe_intermediate_size": 64} if name == "mxfp4" else RAW


def draw(raw: dict[str, Any] = RAW) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in expected_shapes(raw).items()}
