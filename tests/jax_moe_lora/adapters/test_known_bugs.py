"""Bugs that other systems have or had, each by its name; where it was seen stands in the test's docstring."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import AdapterFormatError, ExpertWeights, Model
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.layer.moe import moe_lora
from jax_moe_lora.models import decoder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.nn import moe_sites
from support.adapter_files import CONFIG, EXPERTS_PATH, WEIGHTS, D, E, F, merged_logits, peft, per_expert, write
from support.layers import Spec, assert_close
from support.layers import draw as draw_layer
from support.models import ADAPTER_NAMES
from support.networks import EXPERTS, TINY, save_model, save_random_adapter, tiny

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("parity"), pytest.mark.optimised]

TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tiny("qwen3_moe"), tmp_path_factory.mktemp("base") / "model")


def load(base: Path, max_adapters: int = 1, **adapters: Path) -> Model:
    model = Model.from_pretrained(base, dtype="float32", max_adapters=max_adapters, max_rank=16)
    for name, folder in adapters.items():
        model.load_adapter(folder, adapter_name=name)
    return model


def logits(model: Model, *names: str | None) -> np.ndarray:
    return np.asarray(model.logits(TOKENS[: len(names)], names))


def test_rslora_is_not_ignored_on_experts(base, tmp_path):
    """vLLM 55545, and SGLang: the update was weaker by sqrt(r)."""
    case = peft(r=9, use_rslora=True, target_parameters=EXPERTS)(base, tmp_path / "adapter")
    assert_close(logits(load(base, own=case.folder), "own"), case.expected(TOKENS[:1]), 1e-5)


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"down_proj": 3}}, {"alpha_pattern": {".*1.*gate_up_proj": 9}}])
def test_rank_and_alpha_patterns_are_not_ignored(base, tmp_path, pattern):
    """vLLM, SGLang; TensorRT-LLM for alpha."""
    case = peft(target_parameters=EXPERTS, **pattern)(base, tmp_path / "adapter")
    assert_close(logits(load(base, own=case.folder), "own"), case.expected(TOKENS[:1]), 1e-5)


def test_a_3d_adapter_of_older_peft_is_neither_transposed_nor_dropped(base, tmp_path):
    """vLLM 52198 and 31534, SGLang 27381. Up to 0.19.0 peft took `(E, out, in)` for `(E, in, out)`, and merged so."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((4 * E, D), (F, 4 * E)))
    delta = 1.5 * np.einsum("ore,eri->eio", b.reshape(F, 4, E), a.reshape(E, 4, D))
    np.testing.assert_allclose(down_deltas(base, tmp_path / "adapter", a, b), delta, rtol=1e-4, atol=1e-5)


def down_deltas(base: Path, folder: Path, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """The update of each expert's down projection in layer 1, from a file with these A and B of its 3-D parameter."""
    tensors = {f"{EXPERTS_PATH.format(1)}.lora_{side}.weight": m for side, m in (("A", a), ("B", b))}
    write(folder, tensors, target_parameters=EXPERTS[1:])
    found = read_adapter(folder, decoder.adapter_sites(read_model_config(base)), ADAPTER_NAMES).weights[1, "down"]
    return [found.delta(expert) for expert in range(E)]


@pytest.mark.parametrize("expert", [0, 5])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_order_of_a_3d_parameters_b_is_not_misread(base, tmp_path, rank, expert):
    """vLLM 52198 and 31534, SGLang 27381. One column of B is set: rank-major, expert-minor."""
    a = np.random.default_rng(0).standard_normal((4 * E, F), dtype=np.float32)
    b = np.zeros((D, 4 * E), np.float32)
    b[:, rank * E + expert] = np.arange(1, D + 1)
    delta = np.zeros((E, D, F), np.float32)
    delta[expert] = 1.5 * np.outer(b[:, rank * E + expert], a[expert * 4 + rank])
    np.testing.assert_allclose(down_deltas(base, tmp_path / "adapter", a, b), delta, rtol=1e-6)


def test_unmatched_keys_are_not_only_warned_about(base, tmp_path):
    """SGLang, sglang-jax: the model was served without the adapter. Here all keys lack peft's prefix."""
    folder = peft(target_parameters=EXPERTS)(base, tmp_path / "adapter").folder
    tensors = load_file(folder / WEIGHTS)
    save_file({key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    model = load(base)
    with pytest.raises(AdapterFormatError, match=r"the key model\.layers\.\d.* is not understood: expected base_"):
        model.load_adapter(folder, adapter_name="own")
    assert model.adapters == {}


def test_base_rows_are_not_changed_by_others_nor_by_enabling_lora(base, tmp_path):
    """vLLM 42008 and 49063. Base rows beside adapted ones, and with a bank at all, have the bits of no bank."""
    case = peft(target_modules=["q_proj", "o_proj"], target_parameters=[*EXPERTS, "mlp.gate.weight"])(base, tmp_path)
    model = load(base, own=case.folder)
    run = jax.jit(decoder.logits, static_argnames=("config", "implementation"))
    lengths, nobody = jnp.full(2, TOKENS.shape[1]), jnp.full(2, -1)
    without = run(model.params, None, jnp.asarray(TOKENS), lengths, nobody, config=model.config, implementation=None)
    np.testing.assert_array_equal(logits(model, None, "own")[0], without[0])
    np.testing.assert_array_equal(logits(model, None, None), without)
    np.testing.assert_array_equal(logits(load(base), None, None), without)


def test_the_index_of_no_adapter_does_not_land_on_another_adapter(base, tmp_path):
    """SGLang 24171. -1 counts from the end in an array: here the last slot, and the only one, is taken."""
    case = peft(target_parameters=EXPERTS)(base, tmp_path / "adapter")
    empty, full = load(base), load(base, own=case.folder)
    assert full.slots([None, "own"]).tolist() == [-1, 0]
    np.testing.assert_array_equal(logits(full, None), logits(empty, None))
    assert (logits(full, "own") != logits(empty, None)).any()


def test_an_oversized_maximum_rank_costs_nothing():
    """vLLM 22782: neither memory of the bank or of an adapter, nor padded work: one program serves all above a page.

    Up to 16, one page, there is nothing to loop over: another program, of the same bits.
    """
    problem = draw_layer(Spec(adapters=(("per_expert", 4), ("fused", 16))))
    arguments = [jnp.asarray(w) for w in (problem.x, problem.router)]
    experts = ExpertWeights(*[jnp.asarray(w) for w in (problem.gate, problem.up, problem.down)])
    slots, programs, sizes, results = jnp.asarray(problem.slots, jnp.int32), [], [], []
    for max_rank in (16, 32, 1024):
        bank = create_bank(moe_sites(problem.spec.config), 4, max_rank, 400_000, "float32")
        for slot, adapter in enumerate(problem.adapters):
            bank = insert(bank, slot, adapter)
        program = jax.make_jaxpr(partial(moe_lora, config=problem.spec.config))(
            *arguments, experts, adapters=bank.layer(0), slots=slots
        )
        programs.append(str(program))
        sizes.append((bank.nbytes, bank.slot_nbytes(0), bank.slot_nbytes(1)))
        if max_rank != 32:
            results.append(problem.run(bank=bank))
    assert len(programs[0]) < len(programs[1])
    assert programs[1] == programs[2]
    assert sizes[0] == sizes[1] == sizes[2]
    np.testing.assert_array_equal(results[0], results[1])


def test_a_missing_expert_does_not_shift_the_later_ones_down(base, tmp_path):
    """TensorRT-LLM. Experts 0 and 5 have no gate in layer 1: their update is zero, the others keep theirs."""
    folder = per_expert(base, tmp_path).folder
    tensors = load_file(folder / WEIGHTS)
    deltas: dict[tuple[int, str], np.ndarray] = {}
    for key in [key for key in tensors if "lora_A" in key]:
        layer, expert, part = (key.split(".")[i] for i in (4, 7, 8))
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        if (layer, part) == ("1", "gate_proj") and expert in "05":
            del tensors[key], tensors[key.replace("lora_A", "lora_B")]
        else:
            whole = deltas.setdefault((int(layer), part.removesuffix("_proj")), np.zeros((E, len(b), a.shape[1]), "f"))
            whole[int(expert)] = 1.5 * (b @ a)
    save_file(tensors, folder / WEIGHTS)
    assert_close(logits(load(base, own=folder), "own"), merged_logits(base, deltas)(TOKENS[:1]), 1e-5)


def test_dora_is_not_served_as_lora(base, tmp_path):
    """TensorRT-LLM. Refused by its config, and by its key where the config is silent."""
    folder = save_random_adapter(base, tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    model = load(base)
    with pytest.raises(AdapterFormatError, match="use_dora is True: DoRA is not supported"):
        model.load_adapter(folder, adapter_name="own")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(AdapterFormatError, match=r"q_proj\.lora_magnitude_vector.* DoRA is not supported"):
        model.load_adapter(folder, adapter_name="own")
    assert model.adapters == {}
