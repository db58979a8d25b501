"""Lowered programs that the next process reads: the same answers, nothing traced, and never a wrong program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.demo.run import load_demo
from jax_moe_lora.models import decoder
from jax_moe_lora.serving import functional, kept_programs, programs

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
PROMPTS, NAMES = ["hello>", "abc>", "b>"], ["upper", None, "sort"]


@pytest.fixture(scope="module")
def model():
    return load_demo()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of kept programs, and a process that knows none."""
    monkeypatch.setenv(kept_programs.VARIABLE, str(tmp_path / "programs"))
    forget()
    yield tmp_path / "programs"
    forget()


def forget() -> None:
    """What the next process does not know."""
    for program in (programs.start, programs.advance):
        program.clear_cache()
    functional.functions.cache_clear()


def untraceable(name: str):
    def step(*_, **__):
        raise AssertionError("the model was traced")

    step.__name__ = name
    return step


def answers(model) -> list[list[int]]:
    outs = model.generate(PROMPTS, NAMES, max_new_tokens=6, temperature=0.5, seed=1, pad_to=(4, 16), logprobs=1)
    return [out.token_ids for out in outs]


def steps(model) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a prompt and of a token behind it."""
    fn = model.functional(2, 16)
    slots = fn.slots(["upper", None])
    tokens = jnp.asarray([[4, 5, 6, 0], [7, 8, 0, 0]], jnp.int32)
    cache, first = fn.prefill(fn.params, fn.bank, fn.init_cache(), tokens, jnp.asarray([3, 2], jnp.int32), slots)
    _, second = fn.decode(fn.params, fn.bank, cache, jnp.asarray([5, 6], jnp.int32), slots)
    return np.asarray(first), np.asarray(second)


@pytest.mark.slow
def test_the_next_process_traces_nothing_and_gives_the_same_bits(model, folder, monkeypatch):
    plain = answers(model), steps(model)
    assert len(list(folder.iterdir())) == 4  # start, advance, prefill, decode
    forget()
    for name in ("prefill", "decode", "prefill_routed", "decode_routed"):
        monkeypatch.setattr(decoder, name, untraceable(name))
    assert answers(model) == plain[0]
    assert all(map(np.array_equal, steps(model), plain[1]))
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1000])
    forget()
    with pytest.raises(AssertionError, match="the model was traced"):  # a file that was cut off is none
        answers(model)


@pytest.mark.slow
def test_a_users_transformations_are_of_the_model_itself(model, folder):
    fn = model.functional(1, 16)
    tokens, one, slots = jnp.asarray([[4, 5]], jnp.int32), jnp.asarray([2], jnp.int32), fn.slots(["upper"])

    def loss(params):
        return fn.prefill(params, fn.bank, fn.init_cache(), tokens, one, slots)[1].sum()

    gradient = jax.grad(loss)(fn.params)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    assert not folder.exists()


def test_a_program_is_found_by_all_that_it_depends_on(folder, monkeypatch):
    def double(x, *, factor):
        return x * factor

    def run(x, factor=2):
        return jax.jit(lambda x: kept_programs.kept(double, "double", (x,), factor=factor))(x)

    def found(count: int):
        assert len(list(folder.iterdir())) == count

    x = jnp.ones(3)
    assert run(x).tolist() == run(x).tolist() == [2, 2, 2]
    found(1)
    assert run(x, factor=3).tolist() == [3, 3, 3]
    found(2)
    assert run(jnp.ones(4)).tolist() == [2] * 4
    found(3)
    with jax.default_matmul_precision("highest"):
        run(x)
    found(4)
    monkeypatch.setattr(kept_programs, "_sources", lambda: "others")
    run(x)
    found(5)
    tuned = folder.parent / "tuned.json"
    tuned.write_text("{}")
    monkeypatch.setenv("JAX_MOE_LORA_TUNED", str(tuned))
    run(x)
    tuned.write_text("{ }")
    run(x)
    found(7)


@pytest.mark.parametrize("reason", ["off", "refuses"])
def test_without_a_folder_to_write_to_nothing_is_lost(folder, monkeypatch, reason):
    if reason == "off":
        monkeypatch.setenv(kept_programs.VARIABLE, "")
    else:
        folder.write_text("a file, not a folder")
    run = jax.jit(lambda x: kept_programs.kept(jnp.sin, "sin", (x,)))
    assert run(jnp.zeros(2)).tolist() == [0, 0]
    assert folder.exists() == (reason == "refuses")
