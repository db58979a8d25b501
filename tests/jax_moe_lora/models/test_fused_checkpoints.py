"""Checkpoints whose experts are stacked in 3-D tensors load as those with a tensor per expert, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import LoRAAdapter, merge_adapter
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.models import loading
from support.checkpoints import SHARDS, TINY, load, write
from support.memory import traced
from support.networks import FIRST

Tensors = dict[str, np.ndarray]
INDEX = "model.safetensors.index.json"


def stacked(tensors: Tensors, transposed: bool = False, split: bool = False, suffix: str = "") -> Tensors:
    """The tensors of a checkpoint with a tensor per expert, in a fused form."""
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        experts = sorted({int(n.split(".")[5]) for n in tensors if n.startswith(f"{layer}.experts.")})
        gate, up, down = (
            np.stack([tensors[f"{layer}.experts.{e}.{part}_proj.weight"] for e in experts])
            for part in ("gate", "up", "down")
        )
        stacks = {"gate_proj": gate, "up_proj": up} if split else {"gate_up_proj": np.concatenate((gate, up), 1)}
        for stem, stack in {**stacks, "down_proj": down}.items():
            value = stack.swapaxes(1, 2) if transposed else stack
            kept[f"{layer}.experts.{stem}{suffix}"] = np.ascontiguousarray(value)
    return kept


def rewrite(folder: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint in one file, with other tensors."""
    target.mkdir()
    tensors = {name: value for shard in SHARDS for name, value in load_file(folder / shard).items()}
    save_file(change(tensors), target / "model.safetensors")
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


def assert_equal_trees(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", FIRST)
def test_the_fused_form_of_transformers_5_is_the_same_model(tmp_path: Path, model_type: str) -> None:
    from support.networks import tiny

    dense = {"mlp_only_layers": [1]} if model_type == "qwen3_moe" else {}
    model = tiny(model_type, num_hidden_layers=2, **dense)
    model.save_pretrained(tmp_path / "split", max_shard_size="200KB")
    model.save_pretrained(tmp_path / "fused", max_shard_size="200KB", save_original_format=False)
    names = {name for shard in (tmp_path / "fused").glob("*.safetensors") for name in load_file(shard)}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert_equal_trees(load(tmp_path / "fused"), load(tmp_path / "split"))


FORMS: dict[str, dict[str, Any]] = {
    "as transformers 5": {},
    "stored as in, out": {"transposed": True},
    "a stack per projection": {"split": True},
    "a stack per projection, stored as in, out, named as weights": {
        "split": True,
        "transposed": True,
        "suffix": ".weight",
    },
}


@pytest.mark.parametrize("piece_bytes", [100, loading.PIECE_BYTES])
@pytest.mark.parametrize("form", FORMS)
def test_every_fused_form_is_told_by_its_shape(
    tmp_path: Path, form: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "split", num_hidden_layers=3)
    fused = rewrite(tmp_path / "split", tmp_path / "fused", lambda tensors: stacked(tensors, **FORMS[form]))
    monkeypatch.setattr(loading, "PIECE_BYTES", piece_bytes)
    assert_equal_trees(load(fused), load(tmp_path / "split"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [8, 16], ids=["gate-up-is-square", "down-is-square"])
def test_a_square_stack_is_read_as_the_others_of_its_checkpoint(tmp_path: Path, width: int, transposed: bool) -> None:
    assert TINY["hidden_size"] == 16
    write(tmp_path / "split", moe_intermediate_size=width)
    fused = rewrite(tmp_path / "split", tmp_path / "fused", lambda tensors: stacked(tensors, transposed))
    assert_equal_trees(load(fused), load(tmp_path / "split"))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_stacks_that_are_all_square_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "split", moe_intermediate_size=16)
    message = refusal(rewrite(tmp_path / "split", tmp_path / "fused", lambda tensors: stacked(tensors, split=True)))
    assert all(word in message for word in ("gate_proj", "square", "[in, out]", "one tensor per expert"))


def test_a_square_stack_between_two_orders_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "split", moe_intermediate_size=16, num_hidden_layers=3)

    def mixed(tensors: Tensors) -> Tensors:
        both = stacked(tensors), stacked(tensors, transposed=True)
        return {name: both["layers.2" in name][name] for name in both[0]}

    assert "the others disagree" in refusal(rewrite(tmp_path / "split", tmp_path / "fused", mixed))


def test_a_stack_of_another_shape_is_named_with_the_expected_ones(tmp_path: Path) -> None:
    write(tmp_path / "split")

    def cut(tensors: Tensors) -> Tensors:
        fused = stacked(tensors)
        fused["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros((3, 22, 16), np.float32)
        return fused

    message = refusal(rewrite(tmp_path / "split", tmp_path / "fused", cut))
    assert all(word in message for word in ("gate_up_proj", "[3, 22, 16]", "[3, 24, 16]", "[3, 16, 24]"))


def test_experts_in_both_forms_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "split")
    message = refusal(rewrite(tmp_path / "split", tmp_path / "both", lambda t: {**t, **stacked(t)}))
    assert "no place for" in message
    assert "experts.0.gate_proj.weight" in message
    message = refusal(rewrite(tmp_path / "split", tmp_path / "twice", lambda t: stacked(t) | stacked(t, split=True)))
    assert "both hold" in message


def test_a_missing_stack_names_the_experts_that_it_would_hold(tmp_path: Path) -> None:
    write(tmp_path / "split")

    def cut(tensors: Tensors) -> Tensors:
        return {name: value for name, value in stacked(tensors).items() if "down_proj" not in name or "0" not in name}

    assert "lacks" in (message := refusal(rewrite(tmp_path / "split", tmp_path / "fused", cut)))
    assert "mlp.experts.0.down_proj.weight" in message


def test_a_value_of_a_stack_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "split")

    def poison(tensors: Tensors) -> Tensors:
        fused = stacked(tensors, transposed=True)
        fused["model.layers.0.mlp.experts.gate_up_proj"][2, 3, 20] = np.nan
        return fused

    message = refusal(rewrite(tmp_path / "split", tmp_path / "fused", poison))
    assert "mlp.experts.gate_up_proj" in message
    assert "not finite" in message


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_merging_into_a_fused_checkpoint_is_merging_into_the_split_one(
    tmp_path: Path, form: str, dtype: str | None
) -> None:
    write(tmp_path / "split")
    fused = rewrite(tmp_path / "split", tmp_path / "fused", lambda tensors: stacked(tensors, **FORMS[form]))
    random = np.random.default_rng(1)
    normal = lambda *shape: random.standard_normal(shape, dtype=np.float32)  # noqa: E731
    weights = {
        (0, "gate"): uniform(normal(1, 2, 16), normal(3, 12, 2), 0.5, 3),
        (0, "down"): uniform(normal(3, 2, 12), normal(1, 16, 2), 2.0, 3),
        (0, "router"): uniform(normal(1, 2, 16), normal(1, 3, 2), 1.0, 1),
    }
    adapter = LoRAAdapter("mine", weights)
    for folder in (tmp_path / "split", fused):
        merge_adapter(adapter, folder, tmp_path / f"merged-{folder.name}", dtype=dtype)
    merged = load_file(tmp_path / "merged-fused" / "model.safetensors")
    assert merged.keys() == load_file(fused / "model.safetensors").keys()
    assert_equal_trees(load(tmp_path / "merged-fused"), load(tmp_path / "merged-split"))
    base, changed = load(fused), load(tmp_path / "merged-fused")
    assert (np.asarray(base.layers[0]["gate"]) != np.asarray(changed.layers[0]["gate"])).any()


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_take_the_memory_of_the_arrays_and_a_few_pieces(tmp_path: Path, transposed: bool) -> None:
    wide = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 384}
    write(tmp_path / "split", **wide, num_hidden_layers=3, head_dim=64, num_experts=24)
    fused = rewrite(tmp_path / "split", tmp_path / "fused", lambda tensors: stacked(tensors, transposed))
    params, peak, _ = traced(lambda: jax.block_until_ready(load(fused)))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert arrays > 8 * loading.PIECE_BYTES
    assert peak <= arrays + 3 * loading.PIECE_BYTES, f"{peak} bytes at once for {arrays} of arrays"


def test_a_whole_file_beside_a_stale_index_is_read(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    expected = load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / SHARDS[1]).unlink()
    assert_equal_trees(load(tmp_path), expected)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_equal_trees(load(tmp_path), expected)


def test_a_whole_file_beside_all_shards_of_an_index_is_refused(tmp_path: Path) -> None:
    save_file(write(tmp_path), tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert all(word in message for word in ("weights twice", "model.safetensors", INDEX, "remove one"))
