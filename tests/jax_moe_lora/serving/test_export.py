"""The exported decode step runs in a process that has never heard of this library, and gives the same bits."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jax_moe_lora.demo.run import load_demo
from jax_moe_lora.errors import InputError
from jax_moe_lora.export import decode_arguments, export_decode
from jax_moe_lora.models.cache import Cache
from jax_moe_lora.serving.functional import Functional
from pallas_kernels.backend import target_sms

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
UNUSED: dict[str, Any] = dict.fromkeys(("prefill", "decode", "insert_rows", "append_rows", "free_rows"))

ELSEWHERE = """
import sys
import jax.export
import numpy as np

folder = sys.argv[1]
with open(folder + "/step.bin", "rb") as file:
    step = jax.export.deserialize(bytearray(file.read()))
with np.load(folder + "/inputs.npz") as saved:
    outputs = step.call(*[saved[name] for name in sorted(saved.files)])
np.savez(folder + "/outputs.npz", **{f"{index:05d}": array for index, array in enumerate(outputs)})
assert "jax_moe_lora" not in sys.modules and "pallas_kernels" not in sys.modules
"""


@pytest.mark.slow
def test_an_exported_step_gives_the_same_bits_without_the_library(tmp_path):
    model = load_demo()
    fn = model.functional(batch=3, max_length=8)
    slots = model.slots(["upper", None, "sort"])
    prompt = jnp.asarray([model.tokenizer.encode("abc>")] * 3, jnp.int32)
    lengths = jnp.full(3, prompt.shape[1], jnp.int32)
    cache, _ = jax.jit(fn.prefill)(fn.params, fn.bank, fn.init_cache(), prompt, lengths, slots)
    arrays = decode_arguments(fn, cache, prompt[:, 0], slots)

    step = export_decode(fn)
    assert len(step.inputs) == len(arrays)
    assert step.inputs[-2:] == ("tokens", "slots")
    assert step.outputs[-1] == "logits"
    expected = jax.tree.leaves(jax.jit(fn.decode)(fn.params, fn.bank, cache, prompt[:, 0], slots))

    (tmp_path / "step.bin").write_bytes(step.program)
    np.savez(tmp_path / "inputs.npz", **{f"{i:05d}": np.asarray(array) for i, array in enumerate(arrays)})
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, tmp_path], check=True)
    with np.load(tmp_path / "outputs.npz") as saved:
        outputs = [saved[name] for name in sorted(saved.files)]
    assert len(outputs) == len(expected) == len(step.outputs)
    for name, found, wanted in zip(step.outputs, outputs, expected, strict=True):
        np.testing.assert_array_equal(found, wanted, name)


@pytest.mark.parametrize(("named", "expected"), [(None, 132), (114, 114)])
def test_an_exported_step_is_lowered_for_the_sms_that_are_named_and_says_so(named, expected):
    lowered_for = []

    def decode(params, bank, cache, tokens, slots):
        lowered_for.append(target_sms())
        return cache, params[tokens]

    cache = Cache((), jnp.zeros(2, jnp.int32), 8)
    fn = Functional(params=jnp.zeros((5, 3)), bank=None, init_cache=lambda: cache, **UNUSED | {"decode": decode})
    step = export_decode(fn, platforms=("cuda",), sms=named)
    assert set(lowered_for) == {step.sms} == {expected}
    assert export.deserialize(bytearray(step.program)).fun_name == f"decode_step_for_{expected}_sms"


def test_a_number_of_sms_that_is_none_is_refused():
    fn = Functional(params=None, bank=None, init_cache=lambda: None, **UNUSED)
    with pytest.raises(InputError, match="sms"):
        export_decode(fn, sms=0)
