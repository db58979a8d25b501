"""The scaling model: its memory and sums are those of the rules, its drawn experts those of draws, its refusals clear.

The sums of compiled programs are compared with it in `test_mesh.py`, the page's tables in `tests/test_docs.py`.
"""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jax_moe_lora import InputError
from jax_moe_lora.adapters.bank_sizes import page_bytes, pool_sizes
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.cli.scaling import scaling
from jax_moe_lora.mesh.rules import param_specs, spec_of, split_sites
from jax_moe_lora.mesh.scaling import (
    CLUSTERS,
    MEASURED_SUMS,
    Workload,
    meshes_of,
    predict,
    rank_meshes,
    sum_seconds,
)
from jax_moe_lora.mesh.scaling.costs import busiest, in_use
from jax_moe_lora.mesh.scaling.memory import memory_of
from jax_moe_lora.mesh.scaling.sums import Sum, seconds
from jax_moe_lora.models.cache import init_cache
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.registry import FAMILIES
from jax_moe_lora.models.params import abstract_params
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.models.specs.model import sizes_of_attention

CONFIGS = {name: of.read_config(example(of.model_type), None, of.model_type) for name, of in FAMILIES.items()}
MESH = AbstractMesh((2, 2, 2), ("data", "expert", "tensor"))
QWEN, DEEPSEEK = model_config("qwen3-235b-a22b"), model_config("deepseek-v3")
DECODE = Workload("decode", batch=128, length=2048, adapters=8)


def local_bytes(leaf, spec: PartitionSpec) -> int:
    """What one device of `MESH` has of an array."""
    axes = [axis for entry in spec if entry for axis in ([entry] if isinstance(entry, str) else entry)]
    return leaf.size * leaf.dtype.itemsize // math.prod(MESH.shape[axis] for axis in axes)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_device_holds_what_the_rules_give_it(family):
    config = CONFIGS[family]
    sites = split_sites(config, layer_sites(config), MESH)
    held = memory_of(
        config, MESH, sites, requests=3, positions=8, adapters=5, rank=20, shared=False, weights="bfloat16"
    )
    specs = jax.tree.leaves(param_specs(config, MESH), is_leaf=lambda x: isinstance(x, PartitionSpec))
    leaves = jax.tree.leaves(abstract_params(config, "bfloat16"))
    assert held.weights == sum(local_bytes(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True))
    cached = zip(config.layers, init_cache(config, 6, 8, "bfloat16").layers, strict=True)
    assert held.cache == sum(
        local_bytes(leaf, PartitionSpec("data", *spec_of(getattr(sizes_of_attention(layer), "cache_axes", ()), MESH)))
        for layer, arrays in cached
        for leaf in arrays.values()
    )
    pools = pool_sizes(sites, 5 * 2, None, np.dtype("float16"))
    assert held.pages == sum((1 + n) * page_bytes(w, np.dtype("float16")) // w.parts for w, n in pools.items())


def test_the_sizes_of_published_models():
    one = predict(QWEN, "data=1", Workload(weights="bfloat16")).memory.weights
    assert one == pytest.approx(2 * 235.09e9, rel=1e-3)
    in_8_bits = predict(DEEPSEEK, "data=1", Workload(weights="fp8_block")).memory.weights
    assert predict(DEEPSEEK, "data=1", Workload()).memory.weights == pytest.approx(2 * 671.0e9, rel=1e-3)
    assert in_8_bits == pytest.approx(671.0e9, rel=5e-3)  # embedding and head stay in 16 bits, scales are few
    # Of each of 58 layers 256 experts, three projections of rank 16 between 7168 and 2048.
    adapter = 58 * 256 * 3 * 16 * (7168 + 2048) * 2
    assert predict(DEEPSEEK, "expert=8", replace(DECODE, adapters=8)).memory.pages == pytest.approx(adapter, rel=1e-3)
    shared = predict(DEEPSEEK, "expert=8", replace(DECODE, adapters=8, shared=True)).memory.pages
    assert shared == pytest.approx(8 * 58 * 3 * 16 * (7168 + 32 * 2048) * 2, rel=1e-3)


def test_the_busiest_device_has_the_experts_that_draws_give_it():
    rng = np.random.default_rng(0)
    for experts, top_k, rows, devices in ((128, 8, 8, 8), (256, 8, 8, 64), (128, 8, 32, 2), (256, 8, 128, 16)):
        most = []
        for _ in range(300):
            chosen = rng.random((rows, experts)).argpartition(top_k, axis=1)[:, :top_k]
            used = np.bincount(chosen.reshape(-1), minlength=experts) > 0
            most.append(used.reshape(devices, -1).mean(axis=1).max())
        share = in_use(top_k / experts, rows)
        assert busiest(experts, share, devices) == pytest.approx(np.mean(most), rel=0.08)
    assert busiest(128, 0.3, 1) == 0.3
    assert busiest(128, 1.0, 8) == 1.0


def test_sums_take_the_time_that_was_measured_between_two_gpus():
    for nbytes, measured in MEASURED_SUMS:
        assert sum_seconds(nbytes, "tensor=2", "nvlink") == pytest.approx(measured, rel=0.33)


def test_a_sum_within_a_node_does_not_leave_it():
    cluster = CLUSTERS["nvlink+infiniband"]
    grid = AbstractMesh((8, 8), ("expert", "tensor"))
    within, across = (seconds(Sum((axis,), 8, 2**20), grid, cluster) for axis in ("tensor", "expert"))
    assert within == pytest.approx(14e-6 + 2 * 7 * 2e-6 + 2 * 7 / 8 * 2**20 / 220e9)
    assert across == pytest.approx(14e-6 + 2 * 3 * 8.5e-6 + 2 * 7 / 8 * 2**20 / 40e9)  # one device in each of 8 nodes
    everywhere = seconds(Sum(("expert", "tensor"), 64, 2**20), grid, cluster)
    assert everywhere == pytest.approx(14e-6 + 2 * (7 * 2e-6 + 3 * 8.5e-6) + 2 * 63 / 64 * 2**20 / 220e9)
    # Neighbours of three lie in two nodes, where the node ends between them.
    uneven = seconds(Sum(("tensor",), 3, 0), AbstractMesh((4, 3), ("data", "tensor")), cluster)
    assert uneven == pytest.approx(14e-6 + 2 * (2e-6 + 8.5e-6))


def test_what_a_mesh_splits_and_what_it_does_not():
    one, experts, heads = (predict(QWEN, mesh, DECODE) for mesh in ("data=1", "expert=8", "tensor=4"))
    assert one.sums_s == 0
    assert [len(layer.sums) for layer in experts.layers] == [1, 0]
    assert [len(layer.sums) for layer in heads.layers] == [2, 0]
    # Attention and its cache are whole on each device of `expert`.
    assert experts.memory.cache == one.memory.cache == 4 * heads.memory.cache
    assert experts.layers[-1] == one.layers[-1]
    assert replace(experts.layers[0], sums=(), sums_s=0).device_s < one.layers[0].device_s / 2
    # Each part of `data` has its own requests, and no sums.
    halves = predict(QWEN, "data=2", DECODE)
    assert halves.layers == predict(QWEN, "data=1", replace(DECODE, batch=64)).layers
    assert halves.tokens == 2 * predict(QWEN, "data=1", replace(DECODE, batch=64)).tokens


def test_the_fastest_mesh_that_fits_comes_first():
    found = rank_meshes(QWEN, 8, DECODE)
    assert sorted(one.mesh_text for one in found) == sorted(meshes_of(QWEN, 8))
    assert found[0].step_s == min(one.step_s for one in found if one.fits)
    assert not found[-1].fits
    assert not any(one.fits for one in rank_meshes(DEEPSEEK, 8, DECODE))
    assert "tensor=8" not in meshes_of(QWEN, 8)  # four key/value heads
    assert meshes_of(QWEN, 7) == ["data=7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "tensor=3"}, "tensor=3 does not divide the 64 heads of layer 0"),
        ({"mesh": "tensor"}, "expected AXIS=SIZE"),
        ({"mesh": "expert=16", "interconnect": "nvlink"}, "has 16 devices; this interconnect is that of one node of 8"),
        ({"mesh": "data=16", "interconnect": "nvlink"}, "has 16 devices"),
        ({"mesh": "expert=2", "interconnect": "ethernet"}, "interconnect is 'ethernet'; expected one of nvlink"),
        ({"mesh": "expert=2", "weights": "fp3"}, "weights is 'fp3'; expected one of bfloat16, fp8_block"),
        ({"mesh": "expert=2", "targets": "head"}, "targets is 'head'"),
        ({"mesh": "expert=2", "cache_length": 8}, "positions are 8; this step needs 513"),
        ({"mesh": "expert=2", "rank": 0}, "rank is 0; expected at least 1"),
        ({}, "Give either --mesh"),
        ({"mesh": "expert=2", "gpus": 2}, "Give either --mesh"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(InputError, match=message):
        scaling("qwen3-235b-a22b", **options)


def test_the_command_prints_layers_meshes_and_json(capsys):
    scaling("gpt-oss-20b", mesh="tensor=2")
    printed = capsys.readouterr().out
    for words in ("A prediction, not a measurement", "tensor, tensor", "no multiple of 64", "GQA of 128"):
        assert words in printed
    scaling("deepseek-v3", gpus=8)
    printed = capsys.readouterr().out
    assert "does not fit" in printed
    assert "None of them fits: expert=4,tensor=2 needs the least" in printed
    scaling("deepseek-v3", mesh="expert=64", prefill=True, batch=2, context=1024, as_json=True)
    (one,) = json.loads(capsys.readouterr().out)
    assert one["mesh"] == {"expert": 64}
    assert one["fits"]
    assert [(layer["count"], len(layer["sums"])) for layer in one["layers"]] == [(3, 1), (58, 1), (1, 0)]
    assert one["tokens"] == 2048
