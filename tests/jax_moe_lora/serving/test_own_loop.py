"""A loop of one's own: rows of a running cache join, grow and leave; answers are generate's; nothing compiles twice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError, Model, count_compilations
from jax_moe_lora.demo.run import load_demo
from support.layers import assert_close

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
ROWS, WIDTH, LENGTH = 4, 16, 32


@pytest.fixture(scope="module")
def model() -> Model:
    return load_demo()


@pytest.fixture(scope="module")
def fn(model):
    return model.functional(ROWS, LENGTH)


def padded(*prompts: list[int]) -> tuple[jax.Array, jax.Array]:
    tokens = np.zeros((len(prompts), WIDTH), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray([len(ids) for ids in prompts], jnp.int32)


class Loop:
    """The smallest loop: one prompt joins at a time, all rows decode together."""

    def __init__(self, model: Model, fn):
        self.model, self.fn, self.cache = model, fn, fn.init_cache()
        self.tokens, self.slots = np.zeros(ROWS, np.int32), np.full(ROWS, -1, np.int32)
        self.logits: dict[int, np.ndarray] = {}

    def join(self, row: int, text: str, name: str | None) -> int:
        tokens, lengths = padded(self.model.tokenizer.encode(text))
        self.slots[row] = self.fn.slots([name])[0]
        self._read(self.fn.insert_rows, row, tokens, lengths)
        return int(self.tokens[row])

    def more(self, row: int, ids: list[int]) -> None:
        self._read(self.fn.append_rows, row, *padded(ids))

    def _read(self, function, row: int, tokens, lengths) -> None:
        named, slots = jnp.asarray([row], jnp.int32), jnp.asarray(self.slots[[row]])
        self.cache, logits = self.model.run(function, self.cache, named, tokens, lengths, slots)
        self.logits[row] = np.asarray(logits[0])
        self.tokens[row] = self.logits[row].argmax()

    def step(self) -> list[int]:
        arrays = jnp.asarray(self.tokens), jnp.asarray(self.slots)
        self.cache, logits = self.model.run(self.fn.decode, self.cache, *arrays)
        self.logits = dict(enumerate(np.asarray(logits)))
        self.tokens = np.asarray(logits).argmax(-1).astype(np.int32)
        return self.tokens.tolist()

    def leave(self, row: int) -> None:
        self.cache = self.fn.free_rows(self.cache, jnp.asarray([row]))


@pytest.mark.slow
def test_rows_that_join_and_leave_at_different_times_have_the_answers_of_generate(model, fn):
    loop, answers = Loop(model, fn), {}
    plan = {0: (2, "abc>", "upper"), 1: (0, "hello>", None), 3: (3, "world>", "reverse"), 6: (2, "zyx>", "sort")}
    for step in range(14):
        for row, answer in list(answers.items()):
            if answer and answer[-1] in model.config.eos_token_ids and row in (2,) and step == 6:
                loop.leave(row)
                answers["first"] = answers.pop(row)
        if step in plan:
            row, text, name = plan[step]
            answers[row] = [loop.join(row, text, name)]
        for row, token in enumerate(loop.step()):
            if row in answers:
                answers[row].append(token)
    texts = {key: model.tokenizer.decode(cut(model, answer)) for key, answer in answers.items()}
    assert texts == {"first": "ABC", 0: "hello", 3: "dlrow", 2: "xyz"}


def cut(model: Model, ids: list[int]) -> list[int]:
    ends = [at for at, token in enumerate(ids) if token in model.config.eos_token_ids]
    return ids[: ends[0]] if ends else ids


@pytest.mark.slow
def test_a_prompt_in_chunks_and_a_second_turn_have_the_logits_of_the_whole(model, fn):
    loop, ids = Loop(model, fn), model.tokenizer.encode("hello world, abc>")
    whole = np.asarray(model.logits([ids], ["upper"]))[0]
    loop.slots[1] = fn.slots(["upper"])[0]
    loop._read(fn.insert_rows, 1, *padded(ids[:5]))
    assert_close(loop.logits[1], whole[4], 1e-5)
    loop.more(1, ids[5:12])
    assert_close(loop.logits[1], whole[11], 1e-5)
    loop.tokens[1] = ids[12]  # one token by decode, between the chunks
    loop.step()
    assert_close(loop.logits[1], whole[12], 1e-5)
    loop.more(1, ids[13:])
    assert_close(loop.logits[1], whole[-1], 1e-5)
    assert loop.cache.lengths.tolist() == [0, len(ids), 0, 0]


@pytest.mark.slow
def test_a_row_has_the_same_bits_whatever_joins_grows_and_leaves_beside_it(model, fn):
    def run(busy: bool) -> list[np.ndarray]:
        loop, seen = Loop(model, fn), []
        loop.join(1, "abcdef>", "upper")
        for step in range(6):
            if busy and step == 1:
                loop.join(0, "hello>", "sort")
                loop.join(3, "xyz>", None)
            if busy and step == 3:
                loop.more(3, [5, 6, 7])
                loop.leave(0)
            loop.step()
            seen.append(loop.logits[1])
        return seen

    np.testing.assert_array_equal(run(True), run(False))


@pytest.mark.slow
def test_what_a_row_held_before_reaches_nobody(model, fn):
    """A request whose values were not finite leaves; the next one in its row is not touched by what it left."""
    clean, dirty = Loop(model, fn), Loop(model, fn)
    poisoned = jax.tree.map(lambda side: side.at[1].set(jnp.inf), dirty.cache.layers)
    dirty.cache = replace(dirty.cache, layers=poisoned)
    for loop in (clean, dirty):
        loop.join(1, "abc>", "upper")
        loop.more(1, [7])
        loop.step()
    np.testing.assert_array_equal(dirty.logits[1], clean.logits[1])
    assert np.isfinite(dirty.logits[1]).all()


@pytest.mark.slow
def test_calls_can_be_padded_with_rows_that_the_cache_does_not_have(model, fn):
    loop = Loop(model, fn)
    loop.join(3, "abc>", None)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(loop.cache)]
    tokens, lengths = padded([5, 6])
    for function in (fn.insert_rows, fn.append_rows):
        loop.cache, _ = loop.model.run(function, loop.cache, jnp.asarray([ROWS]), tokens, lengths, jnp.asarray([-1]))
    loop.cache = fn.free_rows(loop.cache, jnp.asarray([ROWS]))
    for old, now in zip(before, jax.tree.leaves(loop.cache), strict=True):
        np.testing.assert_array_equal(old, now)


ROWS_AND_PROMPTS = {"rows": [0, 1], "tokens": [[1] * WIDTH] * 2, "lengths": [2, 2], "slots": [-1, -1]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": [0, 0]}, r"rows are \[0, 0\]; expected each row once"),
        ({"rows": [0, -1]}, r"rows are \[0, -1\]; expected 0 to 3, or 4 for none"),
        ({"rows": [5, 0]}, r"rows are \[5, 0\]; expected 0 to 3"),
        ({"rows": [0.0, 1.0]}, "rows has dtype float32; expected integers"),
        ({"rows": [0]}, r"tokens has shape \[2, 16\]; expected \[1, T\]"),
        ({"lengths": [17, 17]}, r"lengths are \[17, 17\]; expected 0 to 16, the width of tokens"),
        ({"lengths": [2, -1]}, r"lengths are \[2, -1\]; expected 0 to 16"),
        ({"lengths": [2]}, r"lengths has shape \[1\]; expected \[2\]"),
        ({"tokens": [1, 2]}, r"tokens has shape \[2\]; expected \[2, T\]"),
        ({"tokens": [[1, 99], [-1, 1]]}, "tokens lie from -1 to 99; expected ids of 0 to 98"),
        ({"slots": [8, -1]}, "slots has 8; expected -1 .the base model. to 7"),
    ],
)
def test_rows_and_prompts_that_do_not_fit_are_refused_before_anything_runs(fn, given, message):
    cache, arrays = fn.init_cache(), {name: jnp.asarray(values) for name, values in (ROWS_AND_PROMPTS | given).items()}
    for function in (fn.insert_rows, fn.append_rows):
        with pytest.raises(InputError, match=message):
            function(fn.params, fn.bank, cache, *arrays.values())


@pytest.mark.parametrize("name", ["rows", "tokens", "lengths"])
def test_lists_are_refused_by_name(fn, name):
    arrays = {key: values if key == name else jnp.asarray(values) for key, values in ROWS_AND_PROMPTS.items()}
    with pytest.raises(InputError, match=f"{name} is of type list; expected an array"):
        fn.insert_rows(fn.params, fn.bank, fn.init_cache(), *arrays.values())


def test_a_cache_that_was_used_up_is_refused(fn):
    cache, row = fn.init_cache(), jnp.asarray([0])
    fn.free_rows(cache, row)
    tokens, lengths, slots = jnp.ones((1, WIDTH), jnp.int32), jnp.asarray([2]), jnp.asarray([-1])
    for call in (
        lambda: fn.free_rows(cache, row),
        lambda: fn.insert_rows(fn.params, fn.bank, cache, row, tokens, lengths, slots),
        lambda: fn.append_rows(fn.params, fn.bank, cache, row, tokens, lengths, slots),
        lambda: fn.prefill(fn.params, fn.bank, cache, jnp.tile(tokens, (4, 1)), jnp.ones(4, int), -jnp.ones(4, int)),
        lambda: fn.decode(fn.params, fn.bank, cache, jnp.ones(4, int), -jnp.ones(4, int)),
    ):
        with pytest.raises(InputError, match="cache was used up by an earlier call; give the cache that this call"):
            call()
    with pytest.raises(InputError, match="cache is of type NoneType; expected one that init_cache or a call returned"):
        fn.free_rows(None, row)


def test_prompts_that_are_wider_than_the_cache_are_refused(fn):
    with pytest.raises(InputError, match="tokens have 33 a row; the cache has room for 32"):
        fn.insert_rows(
            fn.params,
            fn.bank,
            fn.init_cache(),
            jnp.asarray([0]),
            jnp.ones((1, LENGTH + 1), jnp.int32),
            jnp.asarray([2]),
            jnp.asarray([-1]),
        )


@pytest.mark.slow
def test_tokens_that_a_row_has_no_room_for_are_refused(model, fn):
    loop = Loop(model, fn)
    loop.join(0, "abcdef>", None)
    cache = replace(loop.cache, lengths=jnp.asarray([25, 0, 0, 0]))
    tokens, lengths = padded([5] * 14)
    with pytest.raises(InputError, match=r"rows of at most 32 tokens, which would have \[39\]"):
        fn.append_rows(fn.params, fn.bank, cache, jnp.asarray([0]), tokens, lengths, jnp.asarray([-1]))


@pytest.mark.slow
def test_asking_for_the_functions_twice_compiles_nothing_twice(model):
    def use() -> None:
        fn = model.functional(2, LENGTH)
        tokens, lengths = padded([5, 6], [7])
        slots, cache = jnp.asarray([-1, -1]), fn.init_cache()
        cache, _ = fn.prefill(fn.params, fn.bank, cache, tokens, lengths, slots)
        cache, _ = jax.jit(fn.decode, donate_argnums=2)(fn.params, fn.bank, cache, lengths, slots)
        cache, _ = fn.append_rows(fn.params, fn.bank, cache, jnp.asarray([0, 1]), tokens, lengths, slots)
        fn.free_rows(cache, jnp.asarray([0]))

    use()
    with count_compilations() as count:
        use()
    assert count.compilations == 0
