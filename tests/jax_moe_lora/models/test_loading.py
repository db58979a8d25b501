"""Checkpoints are read exactly, into no more memory than their arrays take, or refused by the name of what is wrong."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.models import loading
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.params import ModelParams, abstract_params, init_params
from support.checkpoints import SHARDS, TINY, edit_index, load, write
from support.memory import traced


def leaves_by_name(params: ModelParams) -> dict[str, np.ndarray]:
    """Our tree in the names of checkpoints, written out from the format: experts unstacked, biases if any."""
    found = {"model.embed_tokens.weight": params.embedding, "model.norm.weight": params.norm}
    found |= {} if params.head is None else {"lm_head.weight": params.head}
    for index, layer in enumerate(params.layers):
        at = f"model.layers.{index}"
        found[f"{at}.input_layernorm.weight"] = layer["attention_norm"]
        found[f"{at}.post_attention_layernorm.weight"] = layer["mlp_norm"]
        found |= {f"{at}.self_attn.{m}_proj.weight": layer[m] for m in "qkvo"}
        found |= {f"{at}.self_attn.{m}_proj.bias": layer[f"{m}_bias"] for m in "qkvo" if "q_bias" in layer}
        found |= {f"{at}.self_attn.{m}_norm.weight": layer[f"{m}_norm"] for m in "qk"}
        for m in ("gate", "up", "down"):
            if "router" in layer:
                found[f"{at}.mlp.gate.weight"] = layer["router"]
                found |= {f"{at}.mlp.experts.{e}.{m}_proj.weight": w for e, w in enumerate(layer[m])}
            else:
                found[f"{at}.mlp.{m}_proj.weight"] = layer[f"mlp_{m}"]
    return {name: np.asarray(value) for name, value in found.items()}


def assert_same(params: ModelParams, tensors: dict[str, np.ndarray], dtype: Any) -> None:
    found = leaves_by_name(params)
    assert found.keys() == tensors.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, tensors[name].astype(dtype), err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_only_layers": []}, {"decoder_sparse_step": 2}],
    ids=["untied", "tied", "biases", "sparse-step"],
)
def test_every_leaf_equals_what_transformers_saved(tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**TINY, "mlp_only_layers": [], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start alike and would hide a swap
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    wanted: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        value = (tensor if dtype == "float32" else tensor.bfloat16().float()).numpy()
        stem, _, last = name.rpartition(".")
        for expert, matrix in enumerate(value if stem.endswith("experts") else ()):
            parts = (
                zip(("gate", "up"), np.split(matrix, 2), strict=True) if last == "gate_up_proj" else [("down", matrix)]
            )
            wanted |= {f"{stem}.{expert}.{part}_proj.weight": rows for part, rows in parts}
        if not stem.endswith("experts") and not (name == "lm_head.weight" and changes.get("tie_word_embeddings")):
            wanted[name] = value
    assert_same(load(tmp_path, dtype), wanted, jnp.dtype(dtype))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_each_stored_dtype_is_cast_exactly(tmp_path: Path, stored: Any, dtype: str) -> None:
    tensors = write(tmp_path, stored)
    assert_same(load(tmp_path, dtype), tensors, jnp.dtype(dtype))


@pytest.mark.parametrize("piece_bytes", [1, 100, 1000])
def test_the_size_of_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    tensors = write(tmp_path)
    monkeypatch.setattr(loading, "PIECE_BYTES", piece_bytes)
    assert_same(load(tmp_path), tensors, np.float32)


def test_a_single_file_and_shards_hold_the_same(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    for file in (*(tmp_path / shard for shard in SHARDS), tmp_path / "model.safetensors.index.json"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), tensors, np.float32)


def test_a_sharding_places_every_array(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load(tmp_path, sharding=sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params))
    assert_same(params, tensors, np.float32)


def test_a_tied_checkpoint_may_still_hold_its_head(tmp_path: Path) -> None:
    tensors = write(tmp_path, tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    assert_same(load(tmp_path), tensors, np.float32)


@pytest.mark.slow
def test_random_weights_have_the_tree_of_loaded_ones(tmp_path: Path) -> None:
    write(tmp_path, num_hidden_layers=1, mlp_only_layers=[])  # each shape compiles once: few of them
    config = read_model_config(tmp_path)
    made = init_params(config, jax.random.key(0), "bfloat16")
    spec = abstract_params(config, "bfloat16")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), spec
    )
    assert jax.tree.structure(made) == jax.tree.structure(load(tmp_path))
    assert jnp.all(made.norm == 1)
    assert 0.015 < float(jnp.std(made.embedding.astype(jnp.float32))) < 0.025


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the first shard's tensors and leaves the index as it is."""
    tensors = load_file(folder / SHARDS[0])
    change(tensors)
    save_file(tensors, folder / SHARDS[0])


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_missing_tensors_are_named_and_counted(tmp_path: Path) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 6}))
    message = refusal(tmp_path)
    assert "mlp.experts.3.gate_proj.weight" in message
    assert "4 more" in message  # three experts of three matrices are missing, five are named


def test_surplus_tensors_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.shared_expert.weight": np.zeros(2, np.float32)}))
    assert "model.layers.0.mlp.shared_expert.weight" in refusal(tmp_path)


def test_a_wrong_shape_is_named_with_the_expected_one(tmp_path: Path) -> None:
    write(tmp_path)
    name = "model.embed_tokens.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    message = refusal(tmp_path)
    assert all(word in message for word in (name, "[16, 32]", "[32, 16]"))


def test_an_integer_tensor_is_refused_by_its_dtype(tmp_path: Path) -> None:
    write(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": np.zeros(16, np.int8)}))
    message = refusal(tmp_path)
    assert "model.norm.weight" in message
    assert "I8" in message


def test_an_fp8_tensor_is_refused_by_its_dtype(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    for shard in SHARDS:
        (tmp_path / shard).unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    header, offset = {}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": "F8_E4M3", "shape": list(value.shape), "data_offsets": [offset, offset + value.size]}
        offset += value.size
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))
    assert "F8_E4M3" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [
        (np.float32, "float32", np.nan),
        (ml_dtypes.bfloat16, "bfloat16", np.inf),
        (np.float16, "bfloat16", -np.inf),
        (np.float32, "float16", 1e6),  # finite until it is cast
    ],
)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.experts.2.down_proj.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, name: str, stored, dtype, value) -> None:
    write(tmp_path, stored)
    shard = next(shard for shard in SHARDS if name in load_file(tmp_path / shard))
    tensors = load_file(tmp_path / shard)
    tensors[name].flat[-1] = value
    save_file(tensors, tmp_path / shard)
    with pytest.raises(CheckpointError, match=rf"{name} in .*{shard} holds values that are not finite in {dtype}"):
        load(tmp_path, dtype)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / SHARDS[1]
    file.write_bytes(file.read_bytes()[:-10])
    assert SHARDS[1] in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert SHARDS[1] in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    write(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: np.zeros((16, 20), np.float32)}))
    message = refusal(tmp_path)
    assert all(word in message for word in (name, *SHARDS))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/outside.safetensors", "deeper/outside.safetensors", ".."]
)
def test_a_shard_outside_the_folder_is_refused_by_name(tmp_path: Path, shard: str) -> None:
    write(tmp_path)
    edit_index(tmp_path, **{"model.norm.weight": shard})
    assert repr(shard) in refusal(tmp_path)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    edit_index(tmp_path, **{"model.embed_tokens.weight": SHARDS[1]})
    assert "model.embed_tokens.weight" in refusal(tmp_path)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in refusal(tmp_path)


def test_headers_are_checked_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"surplus": np.zeros(2, np.float32)}))
    monkeypatch.setattr(loading, "_read", lambda *_: pytest.fail("a tensor was read"))
    assert "surplus" in refusal(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("placed", ["default", "placed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_arrays_and_a_few_pieces(tmp_path: Path, dtype: str, placed: str) -> None:
    """The arrays are the memory that was read into: a copy would not be traced, and what was read would be gone."""
    wide = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512}
    write(tmp_path, **wide, num_hidden_layers=3, head_dim=64, num_experts=24)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if placed == "placed" else None
    params, peak, kept = traced(lambda: jax.block_until_ready(load(tmp_path, dtype, sharding)))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert arrays > 10 * loading.PIECE_BYTES
    assert kept >= arrays, f"of {arrays} bytes of arrays {kept} are host memory that was read into"
    assert peak <= arrays + 3 * loading.PIECE_BYTES, f"{peak} bytes at once for {arrays} of arrays"
