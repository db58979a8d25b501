"""AdapterPool: many adapters behind few slots; who waits, who is evicted, and what a failed load leaves behind."""

import gc
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora import (
    AdapterFormatError,
    AdapterInUseError,
    AdapterNameError,
    BankFullError,
    Model,
    count_compilations,
)
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import LoRAAdapter, Site, uniform
from jax_moe_lora.adapters.pool import AdapterPool
from jax_moe_lora.adapters.pool.content import version
from jax_moe_lora.demo.run import data_folder
from pallas_kernels.ops import BASE_SLOT

SITES = {"up": Site(8, 8, 2, (0,))}
RANK = 16


def adapter(name: str, value: float, rank: int = RANK) -> LoRAAdapter:
    """A page a matrix for each 16 ranks; all of its values are one number."""
    a, b = np.full((2, rank, 8), value, np.float32), np.full((2, 8, rank), value, np.float32)
    return LoRAAdapter(name, {(0, "up"): uniform(a, b, 1.0, 2)})


class Files:
    """Stands for the readers: a folder holds the value of its adapter as text. Counts reads, and can be held up."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.open = threading.Event()
        self.open.set()

    def read(self, folder: Path, name: str) -> LoRAAdapter:
        self.reads.append(name)
        assert self.open.wait(30)
        text = (folder / "adapter_config.json").read_text()
        if text == "broken":
            raise AdapterFormatError(f"{folder} is broken.")
        value, rank = json.loads(text)
        return adapter(name, value, rank)


@pytest.fixture
def files() -> Files:
    return Files()


@pytest.fixture
def pool(files) -> AdapterPool:
    """Two slots, and pages for two adapters of rank 16."""
    return AdapterPool(create_bank(SITES, 2, 4 * RANK, 16 * 8 * 4 * 8, "float32"), files.read)


@pytest.fixture
def folder(tmp_path):
    def make(name: str, value: float = 1.0, rank: int = RANK, text: str | None = None) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps([value, rank]) if text is None else text)
        return tmp_path / name

    return make


def value_of(pool: AdapterPool, slot: int) -> float:
    """The number that the slot's first A page holds in the bank of this moment."""
    bank = pool.using(lambda bank: bank)
    first = int(bank.tables["up"][0, slot, 0, 0])
    assert int(bank.tables["up"][0, slot, 0, 2]) > 0
    return float(bank.pages[8][first, 0, 0])


def test_a_registered_adapter_is_read_when_it_is_asked_for(pool, files, folder):
    pool.register("one", folder("one", 3.0))
    assert pool.status("one").state == "registered"
    assert files.reads == []
    with pool.hold(["one", None, "__base__"]) as (slot, *base):
        assert base == [BASE_SLOT, BASE_SLOT]
        assert value_of(pool, slot) == 3.0
        assert pool.status("one").references == 1
    assert pool.status("one").state == "ready"
    with pool.hold(["one"]):
        assert files.reads == ["one"]


def test_the_one_that_was_used_longest_ago_is_evicted(pool, files, folder):
    for value, name in enumerate("abc"):
        pool.register(name, folder(name, float(value)))
    for name in ("a", "b", "a", "c"):
        pool.load(name)
    assert {name: pool.status(name).state for name in "abc"} == {"a": "ready", "b": "registered", "c": "ready"}
    with pool.hold(["c", "a"]) as slots:
        assert [value_of(pool, slot) for slot in slots] == [2.0, 0.0]
    assert files.reads == ["a", "b", "c"]


def test_a_pinned_adapter_stays(pool, folder):
    pool.register("pinned", folder("pinned"), pinned=True)
    pool.load("pinned")
    for name in "abc":
        pool.register(name, folder(name))
        pool.load(name)
    assert pool.status("pinned").state == "ready"
    pool.pin("c")
    with pytest.raises(
        BankFullError, match="2 in all, 1 needed at once, 2 held by adapters that were loaded or pinned"
    ):
        pool.load("a")
    pool.pin("c", False)
    pool.load("a")
    assert pool.status("c").state == "registered"


def test_what_a_running_batch_uses_is_not_evicted_and_the_next_batch_waits(pool, folder, monkeypatch):
    for name in "abc":
        pool.register(name, folder(name))
    with ThreadPoolExecutor(1) as other, ExitStack() as running:
        slots = running.enter_context(pool.hold(["a", "b"]))
        waits, wait = threading.Event(), pool._changed.wait
        monkeypatch.setattr(pool._changed, "wait", lambda: (waits.set(), wait())[1])
        waiting = other.submit(pool.load, "c")
        while not waits.wait(0.01) and not waiting.done():  # done: it did not wait, and the test fails
            pass
        assert not waiting.done()
        assert [pool.status(name).slot for name in "ab"] == slots
        running.close()
        waiting.result()
    assert pool.status("c").state == "ready"


def test_two_batches_that_need_each_others_slots_both_run(pool, folder):
    """Each takes all of its slots at once or none, so neither holds what the other waits for."""
    for name in "abcd":
        pool.register(name, folder(name))

    def run(names: list[str]) -> None:
        for _ in range(10):
            with pool.hold(names):
                pass

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(run, list(names)) for names in ("ab", "cd", "bc", "da")]:
            done.result()


def test_a_thread_that_would_wait_for_itself_is_told(pool, folder):
    for name in "abc":
        pool.register(name, folder(name))
    with pool.hold(["a", "b"]), pytest.raises(BankFullError, match="the rest used by running requests of this thread"):
        pool.load("c")


def test_more_adapters_than_slots_in_one_batch_are_refused(pool, files, folder):
    for name in "abc":
        pool.register(name, folder(name))
    with pytest.raises(BankFullError, match="2 in all, 3 needed at once"), pool.hold("abc"):
        pass
    assert files.reads == []


def test_a_load_that_fails_tells_its_own_request_alone(pool, folder):
    pool.register("good", folder("good", 5.0))
    pool.register("bad", folder("bad", text="broken"))
    with pool.hold(["good", "bad"]) as (slot, error):
        assert value_of(pool, slot) == 5.0
        assert isinstance(error, AdapterFormatError)
    assert pool.status("bad").state == "failed"
    assert "broken" in (pool.status("bad").error or "")
    folder("bad", 6.0)
    with pool.hold(["good", "bad"]) as slots:  # mended, and tried again
        assert [value_of(pool, slot) for slot in slots] == [5.0, 6.0]


def test_an_adapter_that_is_too_large_leaves_the_bank_as_it_was(pool, folder):
    pool.register("small", folder("small", 5.0))
    pool.register("large", folder("large", 1.0, rank=4 * RANK))
    with pool.hold(["small"]) as (slot,):
        with ThreadPoolExecutor(1) as other, pytest.raises(BankFullError, match="'large' needs"):
            other.submit(pool.load, "large").result()
        assert value_of(pool, slot) == 5.0
    assert pool.status("large").state == "failed"


def test_pages_are_made_free_by_evicting_what_nobody_uses(pool, folder):
    pool.register("small", folder("small"))
    pool.register("larger", folder("larger", 2.0, rank=2 * RANK))
    pool.load("small")
    with pool.hold(["larger"]) as (slot,):
        assert value_of(pool, slot) == 2.0
    assert pool.status("small").state == "registered"


def test_a_changed_folder_is_read_again_and_running_requests_keep_the_old_one(pool, files, folder):
    pool.register("a", folder("a", 1.0))
    with pool.hold(["a"]) as (old,):
        folder("a", 2.0)
        with ThreadPoolExecutor(1) as other:
            other.submit(pool.load, "a").result()
        new = pool.status("a").slot
        assert new is not None
        assert (value_of(pool, old), value_of(pool, new)) == (1.0, 2.0)
    bank = pool.using(lambda bank: bank)
    assert not np.asarray(bank.tables["up"][:, old]).any()
    assert files.reads == ["a", "a"]


def test_a_folder_that_was_only_touched_or_is_gone_is_not_read_again(pool, files, folder):
    path = folder("a", 1.0)
    pool.register("a", path)
    pool.load("a")
    folder("a", 1.0)
    pool.load("a")
    (path / "adapter_config.json").unlink()
    pool.load("a")
    assert files.reads == ["a"]


def test_a_pipe_in_a_folder_is_refused_and_nobody_waits_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        version(tmp_path)


def test_a_prefetch_does_not_wait_and_takes_no_slot_in_use(pool, files, folder):
    for name in "abc":
        pool.register(name, folder(name))
    files.open.clear()
    pool.prefetch(["a"])
    assert pool.status("a").state == "loading"
    with pytest.raises(AdapterInUseError, match="'a' is loading"):
        pool.forget("a")
    files.open.set()
    with pool.hold(["a", "b"]):
        pool.prefetch(["c"])
        assert pool.status("c").state == "registered"
    assert files.reads == ["a", "b"]


def test_a_forgotten_name_is_unknown_and_free(pool, folder):
    pool.register("a", folder("a"))
    with pytest.raises(AdapterNameError, match=r"'a' \(registered\); unload it"):
        pool.register("a", folder("a"))
    pool.load("a")
    with pool.hold(["a"]), pytest.raises(AdapterInUseError, match="used by 1 running"):
        pool.forget("a")
    pool.forget("a")
    with pytest.raises(AdapterNameError, match="No adapter named 'a'"):
        pool.load("a")
    pool.register("a", folder("a"))


def test_a_lent_bank_stays_as_it_was(pool, folder):
    pool.register("a", folder("a", 1.0))
    lent, slots = pool.lend()
    assert slots == {}
    before = [np.array(leaf) for leaf in jax.tree.leaves(lent)]
    pool.load("a")
    for old, now in zip(before, jax.tree.leaves(lent), strict=True):
        np.testing.assert_array_equal(old, now)


NAMES, SLOTS, BATCH = 2000, 16, 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Two thousand adapters of the demo's model, each of its own values."""
    root = tmp_path_factory.mktemp("many")
    config = json.loads((data_folder() / "model" / "config.json").read_text())
    width, rng = config["hidden_size"], np.random.default_rng(0)
    out = config["num_attention_heads"] * config["head_dim"]
    for number in range(NAMES):
        folder = root / str(number)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
        )
        key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        a, b = rng.normal(size=(2, width)), rng.normal(size=(out, 2))
        tensors = {f"{key}A.weight": a.astype(np.float32), f"{key}B.weight": b.astype(np.float32)}
        save_file(tensors, folder / "adapter_model.safetensors")
    return root


def zipf_batches(rng: np.random.Generator, count: int) -> Iterator[list[str | None]]:
    weights = 1 / np.arange(1, NAMES + 1)
    for _ in range(count):
        names = rng.choice(NAMES, BATCH, p=weights / weights.sum())
        yield [None if rng.random() < 0.1 else str(name) for name in names]


@pytest.mark.slow
def test_two_thousand_adapters_behind_sixteen_slots_answer_rightly_without_a_compilation(folders):
    """Three threads with Zipf requests: each row is that of its own adapter, which another model holds alone."""
    options = {"dtype": "float32", "max_rank": 16, "adapter_memory": "4MiB"}
    many = Model.from_pretrained(data_folder() / "model", max_adapters=SLOTS, **options)
    alone = Model.from_pretrained(data_folder() / "model", max_adapters=SLOTS, **options)
    for number in range(NAMES):
        many.register_adapter(folders / str(number), str(number))
    tokens = np.random.default_rng(1).integers(1, 60, (BATCH, 6))
    expected: dict[tuple[str | None, int], np.ndarray] = {}
    lock = threading.Lock()

    def expect(name: str | None, row: int) -> np.ndarray:
        with lock:
            if (name, row) not in expected:
                if name is not None:
                    alone.load_adapter(folders / name, name)
                rows = np.asarray(alone.logits(tokens, [name] * BATCH))
                expected.update({(name, row): rows[row] for row in range(BATCH)})
                if name is not None:
                    alone.unload_adapter(name)
            return expected[name, row]

    def serve(seed: int) -> None:
        for names in zipf_batches(np.random.default_rng(seed), 40):
            answers = np.asarray(many.logits(tokens, names))
            for row, name in enumerate(names):
                np.testing.assert_array_equal(answers[row], expect(name, row), err_msg=f"{name} in {names}")

    expect(None, 0)
    expect("0", 0)
    many.logits(tokens, ["0"] * BATCH)
    with count_compilations() as compiled, ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(serve, seed) for seed in range(3)]:
            done.result()
    assert compiled.compilations == 0
    states = [status.state for status in many.adapter_status.values()]
    assert states.count("ready") == SLOTS
    assert states.count("registered") == NAMES - SLOTS
    assert len({name for name, _ in expected}) > 4 * SLOTS  # most requests did evict
    gc.collect()
    kept = [held for held in gc.get_objects() if type(held) is LoRAAdapter and held.name.isdecimal()]
    assert not kept  # host memory does not grow with what is registered
