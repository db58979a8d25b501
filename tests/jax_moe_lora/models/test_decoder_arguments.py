"""The decoder's pure functions refuse rows of another number or dtype: one slot is not spread over a batch."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import abstract_params
from support.models import decoder_config
from support.unchecked import annotations_unchecked

CONFIG = decoder_config("any", 32, 8, (2, 1, 4), MoEConfig(8, 4, 4, 2))
B, T, M = 3, 4, 6
with annotations_unchecked():
    CACHE = jax.eval_shape(lambda: decoder.init_cache(CONFIG, B, M, "float32"))


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with annotations_unchecked():
        yield


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PROMPT = {"tokens": ints(B, T), "lengths": ints(B), "slots": ints(B)}
PREFILL = PROMPT | {"cache": CACHE}
DECODE = {"cache": CACHE, "tokens": ints(B), "slots": ints(B)}
PACKED = {name: ints(B, T) for name in ("tokens", "positions", "segments", "slots")}
FUNCTIONS = {
    "logits": (decoder.logits, PROMPT),
    "prefill": (decoder.prefill, PREFILL),
    "decode": (decoder.decode, DECODE),
    "packed_logits": (decoder.packed_logits, PACKED),
}


def call(name: str, **changes):
    function, good = FUNCTIONS[name]
    bound = partial(function, config=CONFIG)
    arguments = good | changes
    return jax.eval_shape(lambda params, arguments: bound(params, None, **arguments), PARAMS, arguments)


PARAMS = abstract_params(CONFIG, "float32")


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        ("logits", {"slots": ints(1)}, r"slots has shape \[1\]; expected \[3\]"),
        ("logits", {"lengths": ints(1)}, r"lengths has shape \[1\]; expected \[3\]"),
        ("logits", {"lengths": floats(B)}, "lengths has dtype float32"),
        ("prefill", {"slots": ints(1)}, r"slots has shape \[1\]"),
        ("prefill", {"slots": floats(B)}, "slots has dtype float32"),
        ("prefill", {"tokens": ints(1, T), "lengths": ints(1), "slots": ints(1)}, r"tokens has shape \[1, 4\]"),
        ("prefill", {"tokens": ints(B, M + 1)}, "tokens have 7 a row; the cache has room for 6"),
        ("decode", {"tokens": ints(1)}, r"tokens has shape \[1\]; expected \[3\]"),
        ("decode", {"slots": ints(1)}, r"slots has shape \[1\]; expected \[3\]"),
        ("decode", {"slots": floats(B)}, "slots has dtype float32"),
        ("packed_logits", {"slots": ints(1, T)}, r"slots has shape \[1, 4\]; expected \[3, 4\]"),
        ("packed_logits", {"positions": ints(1, T)}, r"positions has shape \[1, 4\]"),
        ("packed_logits", {"segments": ints(B, 1)}, r"segments has shape \[3, 1\]"),
        ("packed_logits", {"segments": floats(B, T)}, "segments has dtype float32"),
    ],
)
def test_rows_of_another_number_or_dtype_are_refused(function, changes, message):
    with pytest.raises(InputError, match=message):
        call(function, **changes)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_arguments_that_the_cases_change_are_accepted(function):
    assert jax.tree.leaves(call(function))[-1].shape[0] == B
