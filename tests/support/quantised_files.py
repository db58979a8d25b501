"""Quantised checkpoints written from the specifications of their formats, with numpy alone, and what they hold.

Each writer takes matrices `[out, in]` and gives the tensors of a file and the float32 numbers that they mean. Nothing
here is the code under test. A tensor is a pair: its dtype in safetensors' spelling, and its bytes as an array.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Tensor = tuple[str, np.ndarray]
Written = tuple[dict[str, Tensor], np.ndarray]
_NAMES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "uint8": "U8"}


def e4m3_table() -> np.ndarray:
    """The number of each byte: sign, four bits of exponent with bias 7, three of mantissa; 0x7F and 0xFF are NaN."""
    numbers = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        numbers.append(np.nan if code & 0x7F == 0x7F else -size if code & 0x80 else size)
    return np.array(numbers, np.float32)


E4M3 = e4m3_table()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The code of the nearest number of a table, of finite ones."""
    order = np.argsort(table, kind="stable")
    order = order[np.isfinite(table[order])]
    sorted_table = table[order].astype(np.float64)
    places = np.clip(np.searchsorted(sorted_table, values), 1, len(order) - 1)
    left = np.abs(values - sorted_table[places - 1]) <= np.abs(sorted_table[places] - values)
    return order[np.where(left, places - 1, places)].astype(np.uint8)


def spread(scales: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Each value's scale, value by value."""
    rows, columns = np.arange(shape[0]) // block[0], np.arange(shape[1]) // block[1]
    return scales[np.ix_(rows, columns)]


def largest(matrix: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The largest absolute value of each block, at least a small one."""
    rows, columns = (-(-size // step) for size, step in zip(matrix.shape, block, strict=True))
    tops = [
        [
            np.abs(matrix[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]).max()
            for c in range(columns)
        ]
        for r in range(rows)
    ]
    return np.maximum(np.array(tops, np.float32), 1e-6)


def _fp8(matrix: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scales = (largest(matrix, block) / 448).astype(np.float32)
    each = spread(scales, matrix.shape, block)
    codes = nearest(matrix / each, E4M3)
    return codes, scales, E4M3[codes] * each


def fp8_block(matrix: np.ndarray, block: tuple[int, int] = (32, 32)) -> Written:
    codes, scales, numbers = _fp8(matrix, block)
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", scales)}, numbers


def fp8_channel(matrix: np.ndarray) -> Written:
    codes, scales, numbers = _fp8(matrix, (1, matrix.shape[1]))
    return {"weight": ("F8_E4M3", codes), "weight_scale": ("F32", scales)}, numbers


def fp8_tensor(matrix: np.ndarray) -> Written:
    codes, scales, numbers = _fp8(matrix, matrix.shape)
    tensors = {"weight": ("F8_E4M3", codes), "weight_scale": ("F32", scales.reshape(()))}
    return tensors | {"input_scale": ("F32", np.ones((), np.float32))}, numbers


def pair(codes: np.ndarray) -> np.ndarray:
    """Two columns a byte, the even one in the low bits."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def words(codes: np.ndarray, order: Iterable[int] = range(8)) -> np.ndarray:
    """Eight columns a word of int32; nibble i has column `order[i]` of them."""
    grouped = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    total = np.zeros(grouped.shape[:-1], np.uint32)
    for nibble, column in enumerate(order):
        total |= grouped[..., column] << np.uint32(4 * nibble)
    return total.view(np.int32)


def mxfp4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, exponents and numbers of a matrix or a stack of them."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    exponents = np.floor(np.log2(largest(rows, (1, 32)))).astype(int) - 2 + 127
    each = spread(2.0 ** (exponents - 127.0), rows.shape, (1, 32)).astype(np.float32)
    codes = nearest(rows / each, E2M1)
    shape = (*matrix.shape[:-1], matrix.shape[-1] // 32)
    return (
        codes.reshape(matrix.shape),
        exponents.reshape(shape).astype(np.uint8),
        (E2M1[codes] * each).reshape(matrix.shape),
    )


def mxfp4_packed(matrix: np.ndarray) -> Written:
    codes, exponents, numbers = mxfp4(matrix)
    return {"weight_packed": ("U8", pair(codes)), "weight_scale": ("U8", exponents)}, numbers


def _nvfp4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32, np.ndarray]:
    whole = np.float32(np.abs(matrix).max() / (448 * 6))
    scales = nearest(largest(matrix, (1, 16)) / 6 / whole, E4M3)
    each = spread(E4M3[scales] * whole, matrix.shape, (1, 16))
    codes = nearest(matrix / np.maximum(each, 1e-12), E2M1)
    return codes, scales, whole, E2M1[codes] * each


def nvfp4_packed(matrix: np.ndarray) -> Written:
    codes, scales, whole, numbers = _nvfp4(matrix)
    tensors = {"weight_packed": ("U8", pair(codes)), "weight_scale": ("F8_E4M3", scales)}
    return tensors | {"weight_global_scale": ("F32", np.array([1 / whole], np.float32))}, numbers


def nvfp4_modelopt(matrix: np.ndarray) -> Written:
    codes, scales, whole, numbers = _nvfp4(matrix)
    tensors = {"weight": ("U8", pair(codes)), "weight_scale": ("F8_E4M3", scales)}
    return tensors | {"weight_scale_2": ("F32", whole.reshape(())), "input_scale": ("F32", whole.reshape(()))}, numbers


def _int4(matrix: np.ndarray, group: int, zeros: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales in float16, zero points and numbers."""
    grouped = matrix.reshape(matrix.shape[0], -1, group)
    if zeros:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        scales = ((high - low) / 14).astype(np.float16)
        points = np.round(-low / scales.astype(np.float32)).clip(1, 15).astype(np.uint8)
    else:
        scales = (np.abs(grouped).max(-1) / 7).astype(np.float16)
        points = np.full(scales.shape, 8, np.uint8)
    wide, middle = scales.astype(np.float32)[..., None], points[..., None].astype(int)
    codes = (np.round(grouped / wide) + middle).clip(0, 15).astype(np.uint8)
    numbers = (codes.astype(np.float32) - middle) * wide
    return codes.reshape(matrix.shape), scales, points, numbers.reshape(matrix.shape).astype(np.float32)


def int4_packed(matrix: np.ndarray, zeros: bool = False) -> Written:
    codes, scales, points, numbers = _int4(matrix, 8, zeros)
    tensors = {"weight_packed": ("I32", words(codes)), "weight_scale": ("F16", scales)}
    tensors["weight_shape"] = ("I64", np.array(matrix.shape, np.int64))
    if zeros:
        padded = np.pad(points, [(0, -len(points) % 8), (0, 0)])
        tensors["weight_zero_point"] = ("I32", np.ascontiguousarray(words(padded.T).T))
    return tensors, numbers


def awq(matrix: np.ndarray) -> Written:
    codes, scales, points, numbers = _int4(matrix, 8, True)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": ("I32", words(codes.T, order)),
        "qzeros": ("I32", words(points.T, order)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
    }
    return tensors, numbers


def gptq(matrix: np.ndarray, first_format: bool = True) -> Written:
    codes, scales, points, numbers = _int4(matrix, 8, True)
    tensors = {
        "qweight": ("I32", np.ascontiguousarray(words(codes).T)),
        "qzeros": ("I32", words((points - first_format).T)),
        "scales": ("F16", np.ascontiguousarray(scales.T)),
        "g_idx": ("I32", np.arange(matrix.shape[1], dtype=np.int32) // 8),
    }
    return tensors, numbers


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, byte by byte."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def plain(array: np.ndarray) -> Tensor:
    return _NAMES[array.dtype.name], array


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    writer: Callable[[np.ndarray], Written],
    which: str = r".*_proj\.weight",
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> tuple[Path, Path]:
    """A checkpoint whose matrices of these names are quantised, and one of the same numbers in float32.

    Args:
      folder: to write into.
      config: of the model.
      tensors: its weights, float32.
      settings: `quantization_config`.
      writer: of a matrix.
      which: the names that are quantised.
      change: of the quantised checkpoint's tensors, before they are written.
    """
    few: dict[str, Tensor] = {}
    same: dict[str, Tensor] = {}
    for name, array in tensors.items():
        if re.fullmatch(which, name) is None:
            few[name] = same[name] = plain(array)
            continue
        written, numbers = writer(array)
        few |= {name.removesuffix("weight") + suffix: tensor for suffix, tensor in written.items()}
        same[name] = plain(numbers)
    change(few)
    return _pair(folder, config, settings, few, same)


def write_gpt_oss(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> tuple[Path, Path]:
    """The same of gpt-oss, whose experts stand in stacks of blocks and scales; `tensors` has them as `[E, in, out]`."""
    few: dict[str, Tensor] = {}
    same: dict[str, Tensor] = {}
    for name, array in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            few[name] = same[name] = plain(array)
            continue
        codes, exponents, numbers = mxfp4(np.ascontiguousarray(array.transpose(0, 2, 1)))
        few[f"{name}_blocks"] = plain(pair(codes).reshape(*exponents.shape, 16))
        few[f"{name}_scales"] = plain(exponents)
        same[name] = plain(np.ascontiguousarray(numbers.transpose(0, 2, 1)))
    change(few)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _pair(folder, config, settings, few, same)


def stack_experts(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights with the experts of each layer in two stacks: `gate_up_proj` `[E, 2F, D]`, `down_proj`."""
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    others = {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight", name)
        if match is None:
            others[name] = array
        else:
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = array
    for path, modules in found.items():
        gate, up, down = (np.stack([modules[m][e] for e in sorted(modules[m])]) for m in ("gate", "up", "down"))
        others |= {f"{path}.gate_up_proj": np.concatenate([gate, up], 1), f"{path}.down_proj": down}
    return others


def write_fp8_stacks(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    blocks: Callable[[int, int, int], tuple[int, int]] = lambda rows, columns, joined: (32, 32),
    shape: Callable[[np.ndarray], np.ndarray] = lambda scales: scales,
    transposed: bool = False,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    **settings: Any,
) -> tuple[Path, Path]:
    """The same of fp8 experts in stacks, with `_scale_inv` beside each; all else stays float32.

    Args:
      folder: to write into.
      config: of the model.
      tensors: its weights, one tensor per expert.
      blocks: of rows, columns and joined projections of a matrix, the rows and columns of its blocks.
      shape: of the scales `[E, rows, columns]` in the file.
      transposed: matrices are stored as `[in, out]`, and their scales too.
      change: of the quantised checkpoint's tensors, before they are written.
      settings: of `quantization_config`, beside the method.
    """
    few: dict[str, Tensor] = {}
    same: dict[str, Tensor] = {}
    for name, array in stack_experts(tensors).items():
        if array.ndim < 3:
            few[name] = same[name] = plain(array)
            continue
        block = blocks(*array.shape[1:], 1 + name.endswith("gate_up_proj"))
        codes, scales, numbers = (np.stack(each) for each in zip(*(_fp8(one, block) for one in array), strict=True))
        if transposed:
            codes, scales = (np.ascontiguousarray(each.swapaxes(1, 2)) for each in (codes, scales))
        few |= {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", np.ascontiguousarray(shape(scales)))}
        same[name] = plain(numbers)
    change(few)
    return _pair(folder, config, {"quant_method": "fp8", "activation_scheme": "dynamic"} | settings, few, same)


def write_mxfp4_stacks(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> tuple[Path, Path]:
    """The same of mxfp4 experts in stacks, `[E, out, in]`."""
    few: dict[str, Tensor] = {}
    same: dict[str, Tensor] = {}
    for name, array in stack_experts(tensors).items():
        if array.ndim < 3:
            few[name] = same[name] = plain(array)
            continue
        codes, exponents, numbers = mxfp4(array)
        few |= {f"{name}_blocks": plain(pair(codes)), f"{name}_scales": plain(exponents)}
        same[name] = plain(numbers)
    change(few)
    return _pair(folder, config, {"quant_method": "mxfp4"}, few, same)


def _pair(
    folder: Path,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    few: Mapping[str, Tensor],
    same: Mapping[str, Tensor],
) -> tuple[Path, Path]:
    quantised, wide = folder / "quantised", folder / "float32"
    for where, tensors, extra in ((quantised, few, {"quantization_config": settings}), (wide, same, {})):
        where.mkdir(parents=True)
        save(where, tensors)
        (where / "config.json").write_text(json.dumps({**config, **extra}))
    return quantised, wide
