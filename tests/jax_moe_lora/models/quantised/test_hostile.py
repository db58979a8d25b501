"""Damaged quantised checkpoints of every form are refused by the tensor's name, before anything is allocated."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.models import loading
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.quantised.listed import listing
from jax_moe_lora.models.quantised.summary import scale_problems
from pallas_kernels.ops import dequantise
from support import quantised_files as files
from support.checkpoints import load
from support.quantised_cases import CASES, draw, raw_for

EXPERTS = "model.layers.0.mlp.experts"
ONE_LAYER = {"num_hidden_layers": 1, "mlp_only_layers": []}
STACKS: dict[str, Callable[..., Any]] = {
    "fp8 stacks": lambda *given, **how: files.write_fp8_stacks(*given, weight_block_size=[32, 32], **how),
    "mxfp4 stacks": files.write_mxfp4_stacks,
}
OTHER_DTYPES = {"I8": np.int8, "F64": np.float64, "BOOL": np.uint8, "F8_E5M2": np.uint8}  # that no form has
FORMS = [*CASES, *STACKS]
Tensors = dict[str, files.Tensor]


def written(folder: Path, name: str, **settings: Any) -> tuple[Path, Tensors, str]:
    """A checkpoint of a form, its tensors, and the name that those of one quantised matrix begin with."""
    kept: Tensors = {}
    if name in STACKS:
        raw = raw_for("mxfp4") | ONE_LAYER | {"moe_intermediate_size": 96}
        return STACKS[name](folder, raw, draw(raw), change=kept.update)[0], kept, f"{EXPERTS}.down_proj"
    raw, case = raw_for(name) | ONE_LAYER, CASES[name]
    few, _ = files.write(folder, raw, draw(raw), case.settings | settings, case.writer, change=kept.update)
    return few, kept, f"{EXPERTS}.1.up_proj"


def refused(folder: Path, tensors: Tensors) -> str:
    """What is said of these tensors."""
    files.save(folder, tensors)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.endswith("."), message
    assert "\n" not in message, message
    assert ". " not in message, message  # one sentence
    return message


def with_size(array: np.ndarray, axis: int, change: int) -> np.ndarray:
    shape = [size + change * (at == axis) for at, size in enumerate(array.shape)]
    return np.ones(shape, array.dtype)


def of_other_shapes(array: np.ndarray) -> Iterator[np.ndarray]:
    """Arrays of a wrong shape: none of their shapes is that of one number, which forms may spell in several ways."""
    for axis in range(array.ndim):
        yield with_size(array, axis, 1)
        yield with_size(array, axis, array.shape[axis])
        yield with_size(array, axis, -array.shape[axis])
        if array.shape[axis] > 2:
            yield with_size(array, axis, -1)
    if array.size > 1:
        yield array[None, None]


def beside(key: str, module: str) -> bool:
    """Whether a tensor is one of a matrix's values or scales; those of rows are passed over."""
    return key.startswith(module) and not key.endswith("input_scale")


@pytest.mark.parametrize("name", FORMS)
def test_headers_that_do_not_fit_are_refused_before_anything_is_allocated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tensors, module = written(tmp_path, name)
    monkeypatch.setattr(loading, "_aligned", lambda *_: pytest.fail("an array was allocated"))
    keys = [key for key in tensors if beside(key, module)]
    assert len(keys) > 1
    for key in keys:
        dtype, array = tensors[key][0], np.asarray(tensors[key][1])
        if not key.endswith("g_idx"):
            others = {other: tensor for other, tensor in tensors.items() if other != key}
            assert module in refused(folder, others)
        for other_dtype, kind in OTHER_DTYPES.items():
            assert f"{key} in " in refused(folder, tensors | {key: (other_dtype, np.ones(array.shape, kind))})
        for other in of_other_shapes(array):
            assert f"{key} in " in refused(folder, tensors | {key: (dtype, other)})


@pytest.mark.parametrize("name", FORMS)
def test_values_that_are_no_numbers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    folder, tensors, module = written(tmp_path, name)
    for key in (key for key in tensors if beside(key, module)):
        dtype, array = tensors[key][0], np.asarray(tensors[key][1])
        bad: tuple[Any, ...] = ()
        if array.dtype.kind == "f":
            bad = (np.nan, np.inf, -np.inf)
        elif dtype == "F8_E4M3":
            bad = (0x7F, 0xFF)
        elif dtype == "U8" and key.endswith(("_scale", "_scales")):
            bad = (255,)
        for value in bad:
            for place in (0, array.size - 1):
                changed = np.array(array)
                changed.reshape(-1)[place] = value
                assert f"{key} in " in refused(folder, tensors | {key: (dtype, changed)})


@pytest.mark.parametrize("name", FORMS)
def test_a_file_that_ends_early_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder, tensors, module = written(tmp_path, name)
    last = next(key for key in tensors if key.startswith(module))
    order = {key: tensors[key] for key in tensors if key != last} | {last: tensors[last]}
    files.save(folder, order)
    whole = (folder / "model.safetensors").read_bytes()
    for missing in (1, np.asarray(tensors[last][1]).nbytes, len(whole) // 2, len(whole) - 9):
        (folder / "model.safetensors").write_bytes(whole[:-missing])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(folder)


@pytest.mark.parametrize("name", [name for name in FORMS if "mxfp4" not in name])
def test_negative_scales_and_zeros_are_numbers(name: str, tmp_path: Path) -> None:
    """AutoRound writes negative scales, and a block of zeros may have a scale of zero."""
    folder, tensors, module = written(tmp_path, name)
    path = module.removesuffix("_proj").rpartition(".")[2]
    before = np.asarray(dequantise(load(folder).layers[0][path], jnp.float32))
    scales = next(key for key in tensors if beside(key, module) and key.endswith(("_scale", "_scale_inv", "scales")))
    dtype, array = tensors[scales]
    for factor in (-1, 0):
        changed = array * array.dtype.type(factor) if array.dtype.kind == "f" else array ^ 0x80 if factor else array & 0
        files.save(folder, tensors | {scales: (dtype, changed)})
        after = np.asarray(dequantise(load(folder).layers[0][path], jnp.float32))
        chosen = slice(None) if name in STACKS else 1
        np.testing.assert_array_equal(after[chosen], factor * before[chosen])


@pytest.mark.parametrize("name", ["int4", "int4 zero points", "awq", "gptq"])
@pytest.mark.parametrize("group", [24, 128])
def test_groups_that_do_not_divide_a_matrix_are_refused(name: str, group: int, tmp_path: Path) -> None:
    said = CASES[name].settings
    if "config_groups" in said:
        one = said["config_groups"]["group_0"]
        changed = {"config_groups": {"group_0": one | {"weights": one["weights"] | {"group_size": group}}}}
    else:
        changed = {"group_size": group}
    folder, tensors, _ = written(tmp_path, name, **changed)
    assert "scale" in (message := refused(folder, tensors))
    assert message.endswith(f"in groups of {group}.")


@pytest.mark.parametrize(("name", "width"), [("mxfp4", 48), ("nvfp4", 40), ("modelopt nvfp4", 40)])
def test_widths_that_no_block_divides_are_refused(name: str, width: int, tmp_path: Path) -> None:
    folder, tensors, _ = written(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": width}))
    for key in (key for key in tensors if ".experts." in key and key.endswith(("weight", "_packed"))):
        rows, columns = (64, width) if "down_proj" in key else (width, 64)
        tensors[key] = "U8", np.ones((rows, columns // 2), np.uint8)
        scales = key.replace("_packed", "") + "_scale"
        tensors[scales] = tensors[scales][0], np.ones((rows, columns // 16), np.uint8)
        if name == "mxfp4":
            tensors[scales] = "U8", np.ones((rows, columns // 32), np.uint8)
    message = refused(folder, tensors)
    assert re.match(r"\S*down_proj.weight_scale in ", message), message
    assert f"[64, {width}]" in message


def test_scales_have_one_name(tmp_path: Path) -> None:
    """`weight_scale_inv` multiplies as `weight_scale` does; a matrix that has both would be read in two ways."""
    folder, tensors, module = written(tmp_path, "fp8")
    inverse, plain = f"{module}.weight_scale_inv", f"{module}.weight_scale"
    renamed = {key.replace("_scale_inv", "_scale"): tensor for key, tensor in tensors.items()}
    expected = load(folder)
    files.save(folder, renamed)
    for one, other in zip(jax.tree.leaves(load(folder)), jax.tree.leaves(expected), strict=True):
        assert (one == other).all()
    assert plain in refused(folder, tensors | {plain: tensors[inverse]})
    folder, tensors, _ = written(tmp_path / "channel", "fp8 channel")
    assert inverse in refused(folder, tensors | {inverse: tensors[plain]})
    renamed = {key.replace("_scale", "_scale_inv"): tensor for key, tensor in tensors.items()}
    assert "_scale_inv" in refused(folder, renamed)


ALL_NAMES = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
SPELLINGS = [
    f"{EXPERTS}.1.up_proj",
    f"{EXPERTS}.1",
    "model.layers.0",
    "model",
    "up_proj",
    "1.up_proj",
    "model.layers.*.mlp.experts.*.up_proj",
    "*.up_proj",
    "model.layers.0.mlp*",
    "model.layers.*.mlp",
    "re:.*up_proj",
    r"re:^model\.layers\.0\..*$",
    "re:model.layers.0.mlp",
]


@pytest.mark.parametrize("field", ALL_NAMES)
def test_a_module_that_is_listed_and_quantised_is_refused_however_it_is_spelled(field: str, tmp_path: Path) -> None:
    for number, entry in enumerate(SPELLINGS if field == ALL_NAMES[0] else SPELLINGS[:1]):
        folder, tensors, _ = written(tmp_path / str(number), "fp8", **{field: ["lm_head", entry]})
        message = refused(folder, tensors)
        assert "weight_scale_inv" in message
        assert "the config says that" in message


def test_modules_that_are_listed_and_in_16_bits_are_read(tmp_path: Path) -> None:
    entries = [
        "lm_head",
        "gate",
        "proj",
        "up",
        "re:.*mlp.gate$",
        "re:(.+)+_projector$",
        "re:[",
        "*norm",
        "layers.1",
        "up_proj.*",
    ]
    for field in ALL_NAMES:
        folder, *_ = written(tmp_path / field, "fp8", **{field: entries})
        load(folder)


@pytest.mark.parametrize(
    ("entry", "module", "listed"),
    [
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("gate", "model.layers.0.mlp.gate", True),
        ("gate", "model.layers.0.mlp.experts.0.gate_proj", False),
        ("model.layers.*.mlp.router", "model.layers.3.mlp.router", True),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.3.self_attn*", "model.layers.3.self_attn.q_proj", True),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate", True),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate_proj", False),
        (r"re:.*\.gate", "model.layers.0.mlp.gate_proj", True),  # its end is open
        (r"re:model\.head", "model_head", False),
        ("re:(.+)+_projector$", "model.layers.0.mlp.experts.0.gate_proj", False),  # no expression that may take long
    ],
)
def test_each_spelling_lists_what_its_tool_means(entry: str, module: str, listed: bool) -> None:
    assert listing(module, ("lm_head", entry)) == (entry if listed else None)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (
            {"weight_scale": ("F32", np.ones((1,), np.float32))},
            "have formats that differ, fp8_tensor with a scale of all",
        ),
        ({"weight": ("F32", np.ones((48, 64), np.float32))}, "in 16 bits and others"),
    ],
)
def test_experts_of_several_formats_are_found_without_loading_too(one: Tensors, said: str, tmp_path: Path) -> None:
    folder, tensors, module = written(tmp_path, "fp8 channel")
    kept = tensors if "weight_scale" in one else {key: tensors[key] for key in tensors if not key.startswith(module)}
    changed = kept | {f"{module}.{suffix}": tensor for suffix, tensor in one.items()}
    message = refused(folder, changed)
    assert module in message
    assert said in message
    assert [str(error) for error in scale_problems(folder, read_model_config(folder), np.dtype("float32"))] == [message]
