"""Functions of the library's own types are written by `jax.export`, read back, and give the same bits."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_moe_lora
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.linear import dense_plan
from jax_moe_lora.layer.moe import moe_lora
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import abstract_params
from pallas_kernels.pytrees import pytree
from support.layers import Spec, draw
from support.models import decoder_config
from support.unchecked import annotations_unchecked

pytestmark = pytest.mark.optimised


@pytest.fixture(autouse=True)
def _trees_hold_more_than_arrays():
    """jax puts descriptions of its arguments into trees."""
    with annotations_unchecked():
        yield


def read_back(function, *arguments) -> tuple[list, list]:
    """The leaves that a function gives, and those that it gives after its way through a file."""
    jitted = jax.jit(function)
    written = export.export(jitted)(*arguments).serialize()
    return jax.tree.leaves(jitted(*arguments)), jax.tree.leaves(export.deserialize(written).call(*arguments))


@pytest.mark.slow
def test_a_function_of_a_bank_is_exported():
    problem = draw(Spec(tokens=5))
    config, slots = problem.spec.config, jnp.asarray(problem.slots, jnp.int32)

    def layer(bank, experts, router, x):
        return moe_lora(x, router, experts, config, bank.layer(0), slots)

    expected, found = read_back(
        layer, problem.bank, problem.experts, jnp.asarray(problem.router), jnp.asarray(problem.x)
    )
    np.testing.assert_array_equal(found[0], expected[0])


def test_a_bank_that_is_returned_is_exported():
    bank = draw(Spec(tokens=5)).bank
    expected, found = read_back(lambda bank: (bank, bank.layer(0)), bank)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_trees_of_a_model_s_arguments_survive_a_file():
    moe = MoEConfig(32, 16, 4, 2)
    config = decoder_config("qwen2_moe", 64, 32, (2, 1, 16), moe, (True, False), mlp_width=32, shared_width=16)
    cache = jax.eval_shape(lambda: decoder.init_cache(config, 2, 8, "float32"))
    plan = jax.eval_shape(lambda: dense_plan(jnp.arange(2, dtype=jnp.int32), 2))
    trees = abstract_params(config, "float32"), cache, plan
    exported = export.export(jax.jit(lambda *trees: trees))(*trees)
    found = export.deserialize(exported.serialize())
    assert (found.in_tree, found.out_tree) == (exported.in_tree, exported.out_tree)


def test_every_pytree_of_the_library_can_be_exported():
    """None is registered with jax alone, so that no argument is refused for its type."""
    sources = {path: path.read_text() for path in Path(jax_moe_lora.__file__).parent.rglob("*.py")}
    assert sum("@pytree\n" in text for text in sources.values()) > 8
    assert [path for path, text in sources.items() if "register_dataclass" in text] == []


def test_a_static_field_without_a_written_form_is_refused():
    @pytree
    @dataclass(frozen=True)
    class Holder:
        values: jax.Array
        own: object = field(metadata={"static": True})

    exported = export.export(jax.jit(lambda holder: holder.values))(Holder(jnp.ones(2), partial(max)))
    with pytest.raises(TypeError, match="static field"):
        exported.serialize()
