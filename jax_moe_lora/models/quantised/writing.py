"""Quantised matrices as the tensors of a published form, and the config that says which it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_moe_lora.files.dtypes import WRITTEN
from jax_moe_lora.files.safetensors_writer import Planned
from jax_moe_lora.models.quantised import packing
from jax_moe_lora.models.quantised.forms import FORMS, FileTensor, Form, Matrix
from jax_moe_lora.models.quantised.schemes import GPT_OSS, SCHEMES
from pallas_kernels.quantised.array import Quantised

_AS_THEY_STAND = (packing.rows, packing.little_endian, packing.same_shape)


def written_form(scheme: str, model_type: str) -> Form:
    """The form that a scheme is written in.

    Args:
      scheme: a name in `schemes.SCHEMES`.
      model_type: of the model; gpt-oss has a form of mxfp4 of its own.
    """
    names = {"fp8": "fp8_inverse", "mxfp4": "mxfp4" if model_type == GPT_OSS else "mxfp4_packed"}
    return FORMS[names.get(scheme, "int4_packed")]


def writable(form: Form) -> bool:
    """Whether matrices can be written in a form: its numbers stand in the order that `Quantised` has, each by itself.

    Args:
      form: of published files.
    """
    if form is FORMS["fp8_stacked"]:
        return False  # one scale may be that of several matrices
    return all(
        tensor.store in _AS_THEY_STAND and tensor.part not in ("zero_points", "global_scale") for tensor in form.tensors
    )


def planned_tensors(form: Form, matrix: Matrix, scales_dtype: np.dtype) -> dict[FileTensor, Planned]:
    """The tensors of a matrix in a file.

    Args:
      form: of the file.
      matrix: its sizes and format.
      scales_dtype: of scales that may have any.
    """
    planned = {}
    for tensor in (tensor for tensor in form.tensors if not tensor.optional):
        any_float = tensor.part == "scales" and matrix.format.codec == "int4"
        shape = matrix.scales if tensor.part == "scales" else tensor.shapes(matrix)[0]
        planned[tensor] = Planned(scales_dtype if any_float else WRITTEN[tensor.dtypes[0]], shape)
    return planned


def file_array(tensor: FileTensor, planned: Planned, weight: Quantised) -> np.ndarray:
    """One tensor of a matrix.

    Args:
      tensor: of a form that is `writable`.
      planned: its dtype and shape in the file.
      weight: the matrix, of numpy arrays.
    """
    array = np.array(weight.shape) if tensor.part == "check" else np.ascontiguousarray(getattr(weight, tensor.part))
    if tensor.part == "check":
        return array.astype(planned.dtype)
    return array.reshape(-1).view(planned.dtype).reshape(planned.shape)


def written_settings(scheme: str, model_type: str, ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that is written.

    Args:
      scheme: a name in `schemes.SCHEMES`.
      model_type: of the model.
      ignored: the modules that stay as they are.
    """
    if scheme == "fp8":
        settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        return {**settings, "weight_block_size": [*SCHEMES["fp8"].block], "modules_to_not_convert": [*ignored]}
    if scheme == "mxfp4" and model_type == GPT_OSS:
        return {"quant_method": "mxfp4", "modules_to_not_convert": [*ignored]}
    weights: Mapping[str, Any] = {"num_bits": 4, "type": "int"}
    if scheme == "mxfp4":
        weights = {"num_bits": 4, "type": "float", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    shared = {"strategy": "group", "group_size": SCHEMES[scheme].block[1], "symmetric": True, "dynamic": False}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**weights, **shared}}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized" if scheme == "mxfp4" else "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": [*ignored],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
