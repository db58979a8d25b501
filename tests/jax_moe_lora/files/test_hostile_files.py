"""Files that nobody vouches for: always the library's own error that names the file, whatever stands in it.

Never a crash, a hang, a path out of the folder, or memory of more than twice the file and a fixed amount. What the
header parser accepts is compared with what the safetensors library accepts.
"""

import itertools
import json
import os
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, target
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from jax_moe_lora.errors import AdapterFormatError, CheckpointError, ConfigError, JaxMoELoRAError
from jax_moe_lora.files import safetensors_header, safetensors_io
from jax_moe_lora.files.safetensors_io import MAX_HEADER_BYTES, read_json, tensor_infos
from jax_moe_lora.models.config_file import read_model_config
from support.checkpoints import SHARDS, TINY, edit_index
from support.checkpoints import load as load_checkpoint
from support.checkpoints import write as write_checkpoint
from support.memory import peak_memory
from support.peft_files import CONFIG, PREFIX, WEIGHTS, Q, read, write_adapter

SIDECAR = "lora_layout.json"
INDEX = "model.safetensors.index.json"
ALLOWANCE = 192 * 2**20  # of memory, beside twice the file's size
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def packed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(begin: int = 0, end: int = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def named(file: Path, read: Callable[[], Any], error: type[JaxMoELoRAError] = CheckpointError) -> str:
    """What `read` raises: the library's own error, which names the file."""
    with pytest.raises(error) as caught:
        read()
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 5000
    return str(caught.value)


def by_the_library(file: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What safetensors reads in a header; None where it refuses the file."""
    try:
        with safe_open(file, "numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (a handle, no dict)
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError):
        return None


def by_us(file: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        infos = tensor_infos(file, CheckpointError)
    except CheckpointError:
        return None
    return {name: (info.dtype, list(info.shape)) for name, info in infos.items()}


# Headers: what the format does not have.

REFUSED_HEADERS = {
    "negative_offset": json.dumps({"x": entry(-4, 0)}),
    "reversed_offsets": json.dumps({"x": entry(4, 0)}),
    "three_offsets": json.dumps({"x": {**entry(), "data_offsets": [0, 2, 4]}}),
    "no_offsets": json.dumps({"x": {"dtype": "F32", "shape": [1]}}),
    "overlap": json.dumps({"x": entry(0, 4), "y": entry(2, 4, dtype="F16")}),
    "same_bytes_twice": json.dumps({"x": entry(), "y": entry()}),
    "hole": json.dumps({"x": entry(0, 1, dtype="U8"), "y": entry(3, 4, dtype="U8")}),
    "starts_late": json.dumps({"x": entry(2, 4, dtype="F16")}),
    "ends_early": json.dumps({"x": entry(0, 2, dtype="F16")}),
    "past_the_end": json.dumps({"x": entry(0, 8, [2])}),
    "shape_times_dtype": json.dumps({"x": entry(0, 4, [2])}),
    "product_of_2_to_the_64": json.dumps({"x": entry(0, 0, [2**32, 2**32])}),
    "offsets_of_400_digits": '{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + "9" * 400 + "]}}",
    "float_offsets": json.dumps({"x": entry(0.0, 4.0)}),
    "negative_shape": json.dumps({"x": entry(0, 4, [-1])}),
    "text_shape": json.dumps({"x": entry(shape="1")}),
    "half_a_byte": json.dumps({"x": entry(0, 4, [9], "F4")}),
    "dtype_of_the_future": json.dumps({"x": entry(dtype="F7")}),
    "dtype_is_a_number": json.dumps({"x": entry(dtype=32)}),
    "surplus_field": json.dumps({"x": {**entry(), "pickle": "x"}}),
    "key_twice": '{"x": ' + json.dumps(entry()) + ', "x": ' + json.dumps(entry()) + "}",
    "field_twice": '{"x": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "key_twice_by_an_escape": '{"x": ' + json.dumps(entry()) + r', "\u0078": ' + json.dumps(entry(4, 4, [0])) + "}",
    "escape_sequence_in_a_name": json.dumps({"\x1b[2J": entry()}),
    "line_break_in_a_name": json.dumps({"x\ny": entry()}),
    "right_to_left_override": json.dumps({"x\u202e": entry()}),
    "half_of_a_surrogate_pair": r'{"\ud800": ' + json.dumps(entry()) + "}",
    "metadata_of_no_text": r'{"__metadata__": {"a": "\p"}, "x": ' + json.dumps(entry()) + "}",
    "endless_name": json.dumps({"x" * 2000: entry()}),
    "metadata_is_a_list": json.dumps({"__metadata__": [], "x": entry()}),
    "metadata_of_numbers": json.dumps({"__metadata__": {"format": 1}, "x": entry()}),
    "a_list": "[]",
    "a_number": "1",
    "nothing": "",
    "two_objects": json.dumps({"x": entry()}) + "{}",
    "trailing_comma": json.dumps({"x": entry()})[:-1] + ",}",
    "nul_byte": json.dumps({"x": entry()}) + "\0",
    "leading_zero": '{"x": {"dtype": "F32", "shape": [01], "data_offsets": [0, 4]}}',
    "infinity": '{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}',
    "deep_shape": json.dumps({"x": entry(shape=[[1]])}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_HEADERS)
def test_a_header_that_the_format_does_not_have_is_refused(tmp_path, case):
    file = tmp_path / WEIGHTS
    file.write_bytes(packed(REFUSED_HEADERS[case].encode(), b"1234"))
    named(file, lambda: tensor_infos(file, CheckpointError))


ACCEPTED_HEADERS = {
    "no_tensors": (json.dumps({}), b""),
    "metadata_alone": (json.dumps({"__metadata__": {"format": "pt", "note": '{"[": "\\u0041\\n"}'}}), b""),
    "spaces": (json.dumps({"x": entry()}, indent=3) + " " * 40, b"1234"),
    "scalar": (json.dumps({"x": entry(shape=[])}), b"1234"),
    "no_elements": (json.dumps({"x": entry(), "y": entry(4, 4, [3, 0])}), b"1234"),
    "not_in_order": (json.dumps({"y": entry(2, 4, [1], "F16"), "x": entry(0, 2, [1], "BF16")}), b"1234"),
    "unicode": (json.dumps({"größe.層": entry()}, ensure_ascii=False), b"1234"),
    "escapes": (json.dumps({'größe.層"\\': entry()}), b"1234"),
    "eight_bits": (json.dumps({f"x{i}": entry(i, i + 1, dtype=d) for i, d in enumerate(["I8", "F8_E4M3"])}), b"12"),
    "half_bytes": (json.dumps({"x": entry(0, 4, [8], "F4")}), b"1234"),
}


@pytest.mark.parametrize("case", ACCEPTED_HEADERS)
def test_a_header_of_the_format_is_read_as_the_safetensors_library_reads_it(tmp_path, case):
    header, data = ACCEPTED_HEADERS[case]
    file = tmp_path / WEIGHTS
    file.write_bytes(packed(header.encode(), data))
    found = by_us(file)
    assert found is not None
    assert found == by_the_library(file)


SMALL = {"b.weight": entry(0, 8, [2]), "a": entry(8, 12, [2, 1], "BF16"), "__metadata__": {"format": "pt"}}
SMALL_HEADER = json.dumps(SMALL).encode()


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    whole = packed(SMALL_HEADER, bytes(12))
    file = tmp_path / WEIGHTS
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        named(file, lambda: tensor_infos(file, CheckpointError))
    file.write_bytes(whole + b"\0")
    named(file, lambda: tensor_infos(file, CheckpointError))
    file.write_bytes(whole)
    assert by_us(file) == by_the_library(file) is not None


@pytest.mark.parametrize("size", [0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_header_size_that_is_a_lie_takes_no_memory(tmp_path, size):
    file = tmp_path / WEIGHTS
    file.write_bytes(struct.pack("<Q", size) + SMALL_HEADER + bytes(12))
    assert peak_memory(lambda: named(file, lambda: tensor_infos(file, CheckpointError))) < 2**20


def check_against_the_library(file: Path, content: bytes) -> None:
    """We accept no file that the library refuses, and read what it reads in those that both accept."""
    file.write_bytes(content)
    ours = by_us(file)
    assert ours is None or ours == by_the_library(file)


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """A good header with bytes changed, cut, or taken twice: most break late, which is where a parser is weak."""
    text = bytearray(SMALL_HEADER)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        piece = draw(
            st.one_of(
                st.sampled_from([b"", b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-1", b"\\", b"\xff", b" "]),
                st.sampled_from(
                    [b'"x":{}', b"1e9", b"null", b"18446744073709551616", b'"a"', b"\\ud800", b"[[", b"\0"]
                ),
                st.binary(max_size=3),
            )
        )
        text[at : at + draw(st.integers(0, 3))] = piece
    return bytes(text)


def lines_run(call: Callable[[], Any]) -> int:
    """Lines of the header parser that a call runs: what a coverage-guided fuzzer climbs by."""
    seen: set[tuple[str, int]] = set()
    monitor, tool = sys.monitoring, 4

    def note(code: Any, line: int) -> None:
        if code.co_filename == safetensors_header.__file__:
            seen.add((code.co_name, line))

    monitor.use_tool_id(tool, "lines_run")
    monitor.register_callback(tool, monitor.events.LINE, note)
    monitor.set_events(tool, monitor.events.LINE)
    try:
        call()
    finally:
        monitor.set_events(tool, 0)
        monitor.free_tool_id(tool)
    return len(seen)


def fuzz_header(file: Path, header: bytes) -> None:
    """We accept nothing that the library refuses, read what it reads, and raise nothing but our own error.

    Hypothesis is not guided by coverage; the lines that an example runs are its target instead.
    """
    file.write_bytes(packed(header, bytes(12)))
    target(float(lines_run(lambda: by_us(file))))
    ours = by_us(file)
    assert ours is None or ours == by_the_library(file)


@given(mutated_headers())
@settings(max_examples=300, derandomize=True, **UNTIMED)
def test_a_mutated_header_is_read_as_the_library_does_or_refused(tmp_path, header):
    fuzz_header(tmp_path / WEIGHTS, header)


@pytest.mark.slow
@given(st.one_of(mutated_headers(), st.binary(max_size=64)))
@settings(max_examples=2000, derandomize=True, **UNTIMED)
def test_many_mutated_headers_are_read_as_the_library_does_or_refused(tmp_path, header):
    fuzz_header(tmp_path / WEIGHTS, header)


@given(st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["F32", "BF16", "I8", "C64"]), st.lists(st.integers(0, 3), max_size=4)), max_size=5,
))  # fmt: skip
@settings(max_examples=100, derandomize=True, **UNTIMED)
def test_every_file_of_printable_names_is_read_as_the_library_reads_it(tmp_path, tensors):
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = at + int(np.prod(shape, dtype=int)) * {"F32": 4, "BF16": 2, "I8": 1, "C64": 8}[dtype]
        header[name], at = entry(at, end, shape, dtype), end
    file = tmp_path / WEIGHTS
    file.write_bytes(packed(json.dumps(header, ensure_ascii=False).encode(), bytes(at)))
    assert by_us(file) == (by_the_library(file) if all(name.isprintable() for name in tensors) else None)


# Memory: what a small text may become.

AMPLIFIERS = {
    "lists": b"[],",
    "lists_in_lists": b"[",
    "objects": b'{"a":0},',
    "numbers": b"1e5,",
    "big_numbers": b"9999999999,",
    "texts": '"\U0001f600a",'.encode(),
}


@pytest.mark.parametrize("case", AMPLIFIERS)
@pytest.mark.parametrize("kind", ["header", "tensors_shape", "json"])
def test_memory_stays_within_twice_the_file_and_a_fixed_amount(tmp_path, case, kind):
    file, body = tmp_path / "file", AMPLIFIERS[case] * (8 * 2**20 // len(AMPLIFIERS[case]))
    text = b'{"x": [' + body + b"0]}"
    if kind == "tensors_shape":
        text = b'{"x": {"shape": [' + body + b"0]}}"
    file.write_bytes(text if kind == "json" else packed(text))
    read = read_json if kind == "json" else tensor_infos
    check_memory(file, lambda: read(file, CheckpointError))


def test_memory_of_a_header_of_nothing_but_tensors_is_bounded(tmp_path):
    """The most that a header can make of its bytes, names of seven characters and no data: a 32nd of the largest."""
    one = '"{:07d}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    count = MAX_HEADER_BYTES // 32 // len(one)
    file = tmp_path / WEIGHTS
    file.write_bytes(packed(("{" + ",".join(map(one.format, range(count))) + "}").encode()))
    peak = peak_memory(lambda: tensor_infos(file, CheckpointError))
    assert 32 * peak < 2 * MAX_HEADER_BYTES + ALLOWANCE


def check_memory(file: Path, call: Callable[[], Any]) -> None:
    def read_or_refuse() -> None:
        with suppress(CheckpointError):
            call()

    peak = peak_memory(read_or_refuse)
    print(f"peak {peak / 2**20:.0f} MiB for {file.stat().st_size / 2**20:.0f} MiB")
    assert peak < 2 * file.stat().st_size + ALLOWANCE


def test_an_absurd_tensor_is_refused_before_memory_is_taken(tmp_path, monkeypatch):
    """A sparse file of 64 GiB, whose header is right."""
    folder = write_adapter(tmp_path / "adapter", Q)
    a, b = (f"{PREFIX}0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
    header = json.dumps({a: entry(0, 2**36, [2, 2**33]), b: entry(2**36, 2**36 + 256, [32, 2])}).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(packed(header))
        file.truncate(8 + len(header) + 2**36 + 256)
    monkeypatch.setattr(safetensors_io.TensorFile, "_fill", lambda *_: pytest.fail("weights were read"))
    message = []
    peak = peak_memory(lambda: message.append(named(folder / WEIGHTS, lambda: read(folder), AdapterFormatError)))
    assert "lora_A.weight: it has shape [2, 8589934592]" in message[0]
    assert peak < 2**22


# What is no file, and what changes while it is read.


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


NO_FILES: dict[str, Callable[[Path], None]] = {
    "fifo": make_fifo,
    "folder": Path.mkdir,
    "link_to_a_fifo": link_to_a_fifo,
    "link_to_a_device": lambda path: path.symlink_to("/dev/zero"),
    "link_to_a_terminal": lambda path: path.symlink_to("/dev/tty"),
    "link_to_a_folder": lambda path: path.symlink_to(path.parent),
    "link_to_itself": lambda path: path.symlink_to(path.name),
    "link_to_nothing": lambda path: path.symlink_to("gone"),
    "link_to_memory": lambda path: path.symlink_to("/proc/self/mem"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, SIDECAR])
def test_an_adapters_file_must_be_a_regular_one(tmp_path, name, kind):
    folder = write_adapter(tmp_path / "adapter", Q)
    (folder / name).unlink(missing_ok=True)
    NO_FILES[kind](folder / name)
    named(folder / name, lambda: read(folder), AdapterFormatError)


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, SHARDS[1]])
def test_a_checkpoints_file_must_be_a_regular_one(tmp_path, name, kind):
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    NO_FILES[kind](tmp_path / name)
    named(tmp_path / name, lambda: load_checkpoint(tmp_path), JaxMoELoRAError)


def test_links_to_files_work_as_in_the_hubs_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    write_adapter(blobs, Q)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert set(read(snapshot).weights) == {(0, "q")}
    write_checkpoint(tmp_path / "model")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in (tmp_path / "model").iterdir():
        (linked / file.name).symlink_to(file)
    assert load_checkpoint(linked).norm.shape == load_checkpoint(tmp_path / "model").norm.shape


@pytest.mark.parametrize("refusal", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_the_system_does_not_give_is_refused_by_name(tmp_path, monkeypatch, name, refusal):
    """By a stand-in: the superuser may read everything."""
    folder, real = write_adapter(tmp_path / "adapter", Q), os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).name == name:
            raise refusal
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert refusal.strerror in named(folder / name, lambda: read(folder), AdapterFormatError)


def during(monkeypatch, method: str, change: Callable[[], Any]) -> None:
    """Runs `change` once, before the next call of a method of open files."""
    real = getattr(safetensors_io.TensorFile, method)

    def changed(self: Any, *arguments: Any) -> Any:
        monkeypatch.setattr(safetensors_io.TensorFile, method, real)
        change()
        return real(self, *arguments)

    monkeypatch.setattr(safetensors_io.TensorFile, method, changed)


def replace(file: Path) -> None:
    file.with_suffix(".new").write_bytes(file.read_bytes())
    file.with_suffix(".new").replace(file)


def write_into(file: Path) -> None:
    os.utime(file, ns=(1, 1))  # a clock that has not moved since the file was made would hide the change
    with file.open("r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(b"5678")


CHANGES: dict[str, Callable[[Path], None]] = {
    "cut_to_its_header": lambda file: os.truncate(file, 400),
    "emptied": lambda file: os.truncate(file, 0),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 1),
    "written_into": write_into,
    "replaced": replace,
    "removed": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["_array", "_fill"])
def test_weights_that_change_between_header_and_tensor_are_refused(tmp_path, monkeypatch, method, change):
    """Mapped, a file that is cut here would end the process."""
    folder = write_adapter(tmp_path / "adapter", Q)
    during(monkeypatch, method, lambda: CHANGES[change](folder / WEIGHTS))
    message = named(folder / WEIGHTS, lambda: read(folder), AdapterFormatError)
    assert "changed while it was read" in message or "it ends after" in message


@pytest.mark.parametrize("change", ["replaced", "written_into", "removed"])
@pytest.mark.parametrize("name", [CONFIG, SIDECAR])
def test_a_folder_whose_other_files_change_while_it_is_read_is_refused(tmp_path, monkeypatch, name, change):
    folder = write_adapter(tmp_path / "adapter", Q)
    (folder / SIDECAR).write_text('{"version": 1} ')
    during(monkeypatch, "_fill", lambda: CHANGES[change](folder / name))
    named(folder / name, lambda: read(folder), AdapterFormatError)


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_while_the_checkpoint_is_read_is_refused(tmp_path, monkeypatch, change):
    write_checkpoint(tmp_path)
    during(monkeypatch, "_array", lambda: CHANGES[change](tmp_path / SHARDS[1]))
    named(tmp_path / SHARDS[1], lambda: load_checkpoint(tmp_path))


@pytest.mark.slow
def test_a_file_that_is_cut_and_restored_all_the_time_never_ends_the_process(tmp_path):
    folder = write_adapter(tmp_path / "adapter", Q)
    whole, stop, refused = (folder / WEIGHTS).read_bytes(), threading.Event(), 0

    def disturb() -> None:
        while not stop.is_set():
            os.truncate(folder / WEIGHTS, len(whole) // 2)
            (folder / WEIGHTS).write_bytes(whole)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for reads in itertools.count():
            try:
                read(folder)
            except AdapterFormatError:
                refused += 1
            if reads >= 1000 and refused >= 10:
                break
    finally:
        stop.set()
        thread.join()


# Configs, sidecars and indexes.

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


def refused_or_read(file: Path, read: Callable[[], Any]) -> None:
    message = str(file.parent)
    try:
        read()
    except JaxMoELoRAError as error:
        message = str(error)
    assert str(file.parent) in message


MODEL_FIELDS = [
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "head_dim", "mlp_only_layers"),
    *("rope_scaling", "rope_parameters", "eos_token_id", "layer_types", "quantization_config", "rms_norm_eps"),
    *("hidden_act", "decoder_sparse_step", "torch_dtype", "sliding_window", "future"),
]


@given(st.dictionaries(st.sampled_from(MODEL_FIELDS), JSON, min_size=1, max_size=2), JSON)
@example({"model_type": []}, {})
@example({"rope_scaling": {"rope_type": []}}, {})
@settings(max_examples=200, derandomize=True, **UNTIMED)
def test_a_models_config_of_any_values_is_read_or_refused(tmp_path, fields, generation):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **fields}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    refused_or_read(tmp_path / "config.json", lambda: read_model_config(tmp_path))


ADAPTER_FIELDS = [
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias"),
    *("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "future"),
    *("peft_version", "use_dora", "modules_to_save", "task_type"),
]


@given(st.dictionaries(st.sampled_from(ADAPTER_FIELDS), JSON, min_size=1, max_size=2), st.one_of(st.none(), JSON))
@settings(max_examples=200, derandomize=True, **UNTIMED)
def test_an_adapters_config_and_sidecar_of_any_values_are_read_or_refused(tmp_path, fields, sidecar):
    folder = write_adapter(tmp_path / "adapter", Q, **fields)
    (folder / SIDECAR).unlink(missing_ok=True)
    if sidecar is not None:
        (folder / SIDECAR).write_text(json.dumps(sidecar))
    refused_or_read(folder / CONFIG, lambda: read(folder))


@given(JSON, JSON)
@settings(max_examples=100, derandomize=True, **UNTIMED)
def test_an_index_of_any_values_is_refused(tmp_path, whole, weight_map):
    if not (tmp_path / INDEX).exists():
        write_checkpoint(tmp_path)
    for index in (whole, {"weight_map": weight_map}):
        (tmp_path / INDEX).write_text(json.dumps(index))
        named(tmp_path, lambda: load_checkpoint(tmp_path))


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xef\xbb\xbf{", b"", b"nul", b'{"r": "\xed\xa0\x80"}', b"{" * 10_000])
@pytest.mark.parametrize("name", [CONFIG, SIDECAR])
def test_a_text_that_is_no_json_is_refused_by_name(tmp_path, name, text):
    folder = write_adapter(tmp_path / "adapter", Q)
    (folder / name).write_bytes(text)
    named(folder / name, lambda: read(folder), AdapterFormatError)


OTHER_NAMES = [
    "",
    ".",
    f"a/../{SHARDS[0]}",
    f"./{SHARDS[0]}",
    "x\0y",
    "x" * 5000,
    "\ud800",
    "~/x",
    "//x",
    f"{SHARDS[0]}/",
]


@pytest.mark.parametrize("shard", OTHER_NAMES)
def test_a_shard_of_any_other_name_is_refused(tmp_path, shard):
    write_checkpoint(tmp_path)
    edit_index(tmp_path, **{"model.norm.weight": shard})
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_a_link_out_of_the_folder_leaks_nothing_of_what_it_leads_to(tmp_path):
    """A link may lead anywhere, as the hub's cache needs; a file that is no JSON or safetensors is not quoted."""
    secret = tmp_path / "secret"
    secret.write_text("root:hunter2:0:0")
    folder = write_adapter(tmp_path / "adapter", Q)
    for name in (CONFIG, WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        assert "hunter2" not in named(folder / name, lambda: read(folder), AdapterFormatError)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


REPEATED_GROUPS = [r"(\w+\.?)+!", r"(.|\.)*!", r"(?:a*)*b", r"((.*)){1,99}!", r".*(x+x+)+y"]


@pytest.mark.parametrize("pattern", REPEATED_GROUPS)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_a_pattern_that_may_match_for_ever_is_refused(tmp_path, field, pattern):
    value = {pattern: 2} if field == "rank_pattern" else pattern
    folder = write_adapter(tmp_path / "adapter", Q, **{field: value})
    assert field in named(folder / CONFIG, lambda: read(folder), AdapterFormatError)


@pytest.mark.parametrize(
    "pattern", [r".*\.(q|v)_proj", r"model\.layers\.(0|1)\.(self_attn\.)?q_proj", r".*[)+]?q_proj\)?\+*"]
)
def test_other_patterns_are_taken_as_peft_takes_them(tmp_path, pattern):
    assert set(read(write_adapter(tmp_path / "adapter", Q, target_modules=pattern)).weights) == {(0, "q")}


def test_config_errors_stay_short(tmp_path):
    folder = write_adapter(tmp_path / "adapter", Q, lora_alpha="9" * 10**6, new_field=["x" * 10**6])
    named(folder / CONFIG, lambda: read(folder), AdapterFormatError)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x" * 10**6}))
    named(tmp_path / "config.json", lambda: read_model_config(tmp_path), ConfigError)
