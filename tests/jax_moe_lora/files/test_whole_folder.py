"""Folders appear whole or not at all, at whatever point a write fails or its process dies."""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_moe_lora import InputError
from jax_moe_lora.files.folders import _exchange, whole_folder
from jax_moe_lora.files.safetensors_writer import Planned, write_tensors
from support.interruptions import fail, interrupted, interrupting, killed_at

MARKER = "marker.json"


def write(out: Path, content: str, force: bool) -> None:
    with whole_folder(out, MARKER, force) as folder:
        (folder / MARKER).write_text(content)
        (folder / "more").write_text(content)


def contents(out: Path) -> set[str]:
    """What the folder's files say; nothing where there is none."""
    assert not out.exists() or {path.name for path in out.iterdir()} == {MARKER, "more"}
    return {path.read_text() for path in out.iterdir()} if out.exists() else set()


@pytest.fixture(params=["an exchange", "two renames"])
def exchange(request, monkeypatch, tmp_path_factory) -> str:
    """Both ways of replacing a folder."""
    one, other = (tmp_path_factory.mktemp(name) for name in ("one", "other"))
    if request.param == "an exchange" and not _exchange(one, other):
        pytest.skip("this file system exchanges no folders")
    if request.param == "two renames":
        monkeypatch.setattr("jax_moe_lora.files.folders._exchange", lambda *_: False)
    return request.param


@pytest.mark.parametrize("replaces", [False, True])
def test_a_failure_at_any_point_leaves_what_was_there(tmp_path, exchange, replaces):
    for n in range(1, 100):
        folder = tmp_path / str(n)
        folder.mkdir()
        out = folder / "out"
        if replaces:
            write(out, "old", force=False)
        interrupting(n, folder, fail)
        with suppress(InputError):
            write(out, "new", force=replaces)
        fired = interrupted()
        assert contents(out) in ({"new"}, {"old"} if replaces else set()), n
        write(out, "next", force=out.exists())
        assert (contents(out), [path.name for path in folder.iterdir()]) == ({"next"}, ["out"])
        if not fired:
            break
    assert 5 < n < 99


@pytest.mark.slow
@pytest.mark.parametrize("replaces", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_kill_at_any_point_leaves_no_half_folder_and_the_next_run_cleans_up(tmp_path, exchange, replaces):
    killed = 0
    for n in range(1, 100):
        folder = tmp_path / str(n)
        folder.mkdir()
        out = folder / "out"
        if replaces:
            write(out, "old", force=False)
        status = killed_at(n, folder, partial(write, out, "new", replaces))
        found = contents(out)
        if exchange == "two renames" and not found:  # between the two
            found = contents(folder / ".out.replaced")
        assert found in ({"new"}, {"old"} if replaces else set()), n
        write(out, "next", force=True)
        assert (contents(out), [path.name for path in folder.iterdir()]) == ({"next"}, ["out"])
        if status == 0:
            break
        killed += 1
    assert 5 < killed < 99


def test_everything_is_on_disk_before_the_folder_appears(tmp_path, monkeypatch):
    """By its inodes: each file and the folder while `out` is not there yet, then the entry in its parent."""
    synced, fsync, out = [], os.fsync, tmp_path / "out"

    def recording(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, out.exists()))

    monkeypatch.setattr(os, "fsync", recording)
    write(out, "new", force=False)
    files = [(path.stat().st_ino, False) for path in out.iterdir()]
    assert sorted(synced[:-2]) == sorted(files)
    assert synced[-2:] == [(out.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_a_full_disk_is_a_sentence(tmp_path):
    with (
        pytest.raises(InputError, match="out cannot be written: No space left on device"),
        whole_folder(tmp_path / "out", MARKER),
    ):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_that_a_death_between_two_renames_left_aside_is_put_back(tmp_path):
    write(tmp_path / "out", "old", force=False)
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(InputError, match="out exists"):
        write(tmp_path / "out", "new", force=False)
    assert contents(tmp_path / "out") == {"old"}


def test_two_processes_do_not_write_one_folder(tmp_path):
    with whole_folder(tmp_path / "out", MARKER) as folder:
        (folder / MARKER).write_text("first")
        (folder / "more").write_text("first")
        with pytest.raises(InputError, match="is being written by another process"):
            write(tmp_path / "out", "second", force=False)
    assert contents(tmp_path / "out") == {"first"}


@pytest.mark.parametrize(
    ("make", "force", "sentence"),
    [
        (lambda out: write(out, "old", False), False, r"out exists; name a new folder, or replace it with force"),
        (lambda out: out.mkdir(), False, "out exists"),
        (lambda out: out.write_text("x"), True, "out is no folder, and force replaces folders alone"),
        (lambda out: out.symlink_to(out.parent), True, "out is no folder"),
        (lambda out: (out.mkdir(), (out / "thesis.txt").write_text("x")), True, r"out holds no marker\.json"),
        (lambda out: (write(out, "old", False), (out / "sub").mkdir()), True, "out holds the folder sub, which force"),
    ],
)
def test_what_force_may_not_delete_is_kept(tmp_path, make, force, sentence):
    out = tmp_path / "out"
    make(out)
    before = sorted(path.name for path in out.iterdir()) if out.is_dir() else None
    with pytest.raises(InputError, match=sentence):
        write(out, "new", force)
    assert (sorted(path.name for path in out.iterdir()) if out.is_dir() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    random = np.random.default_rng(0)
    kinds: list[Any] = [ml_dtypes.bfloat16, np.float32, np.float16]
    given = {f"t{n}": random.standard_normal((n, 3)).astype(kinds[n % 3]) for n in range(6)}
    given["column order"] = np.asfortranarray(random.standard_normal((4, 5), dtype=np.float32))
    planned = {name: Planned(t.dtype, t.shape) for name, t in given.items()}
    write_tensors(tmp_path / "file.safetensors", planned, given.__getitem__)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
