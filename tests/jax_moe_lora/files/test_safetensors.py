"""JSON and safetensors files that are broken: the library's own error, which names the file."""

import json

import pytest

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import open_tensors, read_json, tensor_infos
from support.peft_files import CONFIG, WEIGHTS

BAD_JSON = {
    "not_json": (b"{", "not valid JSON"),
    "not_utf8": (b'{"r": "\xff"}', "not valid JSON"),
    "not_an_object": (b"[]", "expected an object"),
    "key_twice": (b'{"r": 1, "r": 2}', "'r' twice"),
    "endless_number": (b'{"r": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "deep": (b"[" * 200_000, "not valid JSON"),
    "oversized": (b" " * (16 * 2**20 + 1), "bytes"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_json_file_is_an_error_that_names_it(tmp_path, case):
    content, pattern = BAD_JSON[case]
    file = tmp_path / CONFIG
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_json(file, CheckpointError)
    assert str(file) in str(caught.value)


def test_a_byte_order_mark_before_json_is_no_part_of_it(tmp_path):
    (tmp_path / CONFIG).write_bytes(b'\xef\xbb\xbf{"r": 1}')
    assert read_json(tmp_path / CONFIG, CheckpointError) == {"r": 1}


def header(shape: list[int], end: int, dtype: str = "F32") -> bytes:
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text


BAD_TENSORS = {
    "empty": b"",
    "absurd_header_size": (2**63).to_bytes(8, "little") + b"{}",
    "header_past_the_end": (2**20).to_bytes(8, "little") + b"{}",
    "header_is_no_json": (4).to_bytes(8, "little") + b"oops",
    "truncated": header([4], 16) + b"1234",
    "shape_past_the_offsets": header([2**40, 2**40], 4) + b"1234",
    "unknown_dtype": header([4], 4, "Q7") + b"1234",
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_safetensors_file_is_an_error_that_names_it(tmp_path, case):
    file = tmp_path / WEIGHTS
    file.write_bytes(BAD_TENSORS[case])
    with pytest.raises(CheckpointError) as caught:
        tensor_infos(file, CheckpointError)
    assert str(file) in str(caught.value)


def test_a_folder_or_nothing_is_no_safetensors_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(path)):
            tensor_infos(path, CheckpointError)


def test_fp8_is_described_and_refused_when_it_is_read(tmp_path):
    file = tmp_path / WEIGHTS
    file.write_bytes(header([4], 4, "F8_E4M3") + b"1234")
    assert tensor_infos(file, CheckpointError)["x"].dtype == "F8_E4M3"
    with pytest.raises(CheckpointError, match=str(file)), open_tensors(file, CheckpointError) as tensors:
        tensors.get_tensor("x")
