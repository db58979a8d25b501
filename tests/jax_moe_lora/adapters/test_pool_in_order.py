"""Where several processes share a bank, what a pool does follows from the order of its calls and what they agree on."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import LoRAAdapter, Site, uniform
from jax_moe_lora.adapters.pool import AdapterPool

SITES = {"up": Site(8, 8, 2, (0,))}
ORDER = ["a", "b", "a", "c", "b", "d", "a"]


class Other:
    """Stands for another process, which may fail where this one does not, and may see other files."""

    alone = False

    def __init__(self) -> None:
        self.fails_on: set[str] = set()
        self.sees: str | None = None

    @contextmanager
    def all_or_none(self, value):
        yield
        compared = value()
        if compared is not None and self.fails_on & {str(part) for part in compared}:
            raise AdapterFormatError("Process 1: a file is missing.")

    def of_first(self, message):
        return message() if self.sees is None else self.sees


def make(seconds: dict[str, float], other: Other) -> tuple[AdapterPool, list[str]]:
    """A pool of two slots whose adapters take so long to read; and the threads that read."""
    threads = []

    def read(folder, name):
        threads.append(threading.current_thread().name)
        time.sleep(seconds.get(name, 0))
        value = np.full((2, 16, 8), float(ord(name)), np.float32)
        return LoRAAdapter(name, {(0, "up"): uniform(value, value.swapaxes(1, 2), 1.0, 2)})

    return AdapterPool(create_bank(SITES, 2, 16, None, "float32"), read, other), threads


def folder_of(tmp_path, name):
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "adapter_config.json").write_text(name)
    return tmp_path / name


def slots_after_each(pool) -> list[dict[str, int]]:
    slots = []
    for name in ORDER:
        pool.load(name)
        slots.append({info.name: info.slot for info in pool.loaded()})
    return slots


def test_slots_do_not_depend_on_how_fast_adapters_are_read(tmp_path):
    seen = []
    for seconds in ({}, {"a": 0.05}, {"b": 0.05, "c": 0.02}):
        pool, threads = make(seconds, Other())
        for name in "abcd":
            pool.register(name, folder_of(tmp_path, name))
        seen.append(slots_after_each(pool))
        assert set(threads) == {threading.current_thread().name}
    assert seen[0] == seen[1] == seen[2]
    assert ["".join(sorted(slots)) for slots in seen[0]] == ["a", "ab", "ab", "ac", "bc", "bd", "ad"]


def test_an_adapter_that_another_process_cannot_load_is_in_no_slot(tmp_path):
    other = Other()
    pool, _ = make({}, other)
    for name in "ab":
        pool.register(name, folder_of(tmp_path, name))
    pool.load("b")
    other.fails_on = {"1"}  # the slot that it would get
    with pytest.raises(AdapterFormatError, match="Process 1: a file is missing"):
        pool.load("a")
    assert pool.status("a").state == "failed"
    assert [info.name for info in pool.loaded()] == ["b"]
    other.fails_on.clear()
    pool.load("a")
    assert [info.slot for info in pool.loaded()] == [0, 1]


def test_whether_a_folder_has_changed_is_what_the_first_process_sees(tmp_path):
    other = Other()
    pool, threads = make({}, other)
    pool.register("a", folder_of(tmp_path, "a"))
    pool.load("a")
    other.sees = "0"
    (tmp_path / "a" / "adapter_config.json").write_text("changed")
    pool.load("a")
    assert len(threads) == 1
    other.sees = "1"
    pool.load("a")
    assert len(threads) == 2
