"""The table of rules, meshes that users name, and banks whose pages are in regions."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from jax_moe_lora import InputError, Model
from jax_moe_lora.adapters.bank import compact, create_bank, remove
from jax_moe_lora.adapters.extraction import extract
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.errors import BankFullError
from jax_moe_lora.mesh.rules import RULES, check_mesh, make_mesh, param_specs, split_sites
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.registry import FAMILIES
from jax_moe_lora.models.params import abstract_params
from jax_moe_lora.models.sites import adapter_sites, layer_sites
from jax_moe_lora.nn import moe_sites
from support.checkpoints import write
from support.layers import LAYER, Spec, draw
from support.meshes import random_adapter

CONFIGS = {name: of.read_config(example(of.model_type), None, of.model_type) for name, of in FAMILIES.items()}


def mesh_of(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("experts=2", "axis 'experts'; expected some of data, expert, tensor"),
        ("expert", "'expert'; expected AXIS=SIZE"),
        ("expert=0", "'expert=0'; expected AXIS=SIZE"),
        ("expert=1,expert=1", "axis 'expert' twice"),
        ("data=2,expert=4", "needs 8 devices; jax has 1 here"),
        (8, "of type int; expected text"),
        (Mesh(np.array(jax.devices()[:1]), ("x",)), "axis 'x'; expected some of"),
    ],
)
def test_meshes_that_are_none_are_refused_before_anything_is_read(mesh, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Model.from_pretrained(tmp_path, mesh=mesh)


def test_a_mesh_is_named_by_text_or_made_by_jax():
    assert make_mesh(None) is None
    assert dict(make_mesh("expert=1, data=1").shape) == {"data": 1, "expert": 1}
    assert dict(make_mesh(Mesh(np.array(jax.devices()[:1]), ("tensor",))).shape) == {"tensor": 1}


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("mixtral", {"expert": 3}, "expert=3 does not divide the 4 experts of layer 0"),
        ("qwen3_moe", {"tensor": 4}, "tensor=4 does not divide the 2 key/value heads of layer 0"),
        ("deepseek_v3", {"tensor": 3}, "tensor=3 does not divide the 4 heads of layer 0"),
        ("qwen2_moe", {"expert": 4, "tensor": 2}, None),
        ("olmoe", {"tensor": 16}, None),  # its attention is whole on each device
        ("olmoe", {"tensor": 32}, "tensor=32 does not divide the 16 columns of an expert of layer 0"),
        ("qwen2_moe", {"expert": 2, "tensor": 3}, "tensor=3 does not divide the 4 heads of layer 0"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(family, sizes, message):
    if message is None:
        check_mesh(CONFIGS[family], mesh_of(**sizes))
    else:
        with pytest.raises(InputError, match=message):
            check_mesh(CONFIGS[family], mesh_of(**sizes))


def test_a_mesh_is_checked_before_weights_are_read(tmp_path: Path, monkeypatch):
    write(tmp_path)  # three experts
    monkeypatch.setattr("jax_moe_lora.serving.model.make_mesh", lambda _: mesh_of(expert=2))
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(InputError, match="expert=2 does not divide the 3 experts of layer 0"):
        Model.from_pretrained(tmp_path, mesh="expert=2")


def test_a_batch_of_ones_own_is_a_multiple_of_the_data_axis():
    config = CONFIGS["mixtral"]
    model = Model(config, None, create_bank({"q": layer_sites(config)["q"]}, 1, 16), mesh=mesh_of(data=2))
    with pytest.raises(InputError, match="batch is 3; expected a multiple of 2, the mesh's data axis"):
        model.functional(batch=3, max_length=8)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_a_rule_for_each_axis_that_it_splits(family):
    config, mesh = CONFIGS[family], mesh_of(data=2, expert=2, tensor=2)
    check_mesh(config, mesh)
    shapes, specs = abstract_params(config, "float32"), param_specs(config, mesh)
    split = set()
    for (path, leaf), spec in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True
    ):
        assert len(spec) <= len(leaf.shape), path
        split.update(axis for axes in spec if axes for axis in ([axes] if isinstance(axes, str) else axes))
    assert split == {"expert", "tensor"}
    sites = adapter_sites(config)
    for module, site in split_sites(config, sites, mesh).items():
        assert replace(site, split=None) == sites[module]
        assert site.regions == (2 if site.num_experts > 1 else 1)


def test_the_rules_name_logical_axes_that_parameters_have():
    axes = {
        axis
        for config in CONFIGS.values()
        for layer in config.layers
        for row in layer.parameters(config.hidden_size)
        for axis in row.axes
    }
    assert set(RULES) <= axes


def regions(problem, count):
    """The problem's sites with the experts' pages in regions, as on a mesh, on one device."""
    config, rows = CONFIGS["qwen3_moe"], {"gate", "up", "down"}
    sites = split_sites(config, moe_sites(problem.spec.config), mesh_of(expert=count))
    assert {module for module, site in sites.items() if site.regions == count} == rows
    return sites


def test_pages_in_regions_give_the_same_bits():
    problem = draw(Spec())
    sites = regions(problem, 4)
    bank = create_bank(sites, problem.spec.slots, problem.spec.max_rank, None, "float32")
    for slot, adapter in enumerate(problem.adapters):
        bank = insert(bank, slot, adapter)
    arguments = jnp.asarray(problem.x), jnp.asarray(problem.router), problem.experts, problem.spec.config
    slots = jnp.asarray(problem.slots, jnp.int32)
    for stage in (bank, compact(remove(bank, 0))):
        there = slots if stage is bank else jnp.where(slots == 0, -1, slots)
        wanted = LAYER(*arguments, problem.bank.layer(0), there)
        np.testing.assert_array_equal(LAYER(*arguments, stage.layer(0), there), wanted)
        for module, site in sites.items():
            if site.regions > 1:
                table = np.asarray(stage.tables[module])
                for column, width in enumerate(site.pools):
                    region = table[..., column] // (stage.pages[width].shape[0] // 4)
                    mine = np.arange(site.num_experts) * 4 // site.num_experts
                    assert (region == mine)[table[..., 2] > 0].all()
        for slot in range(1, len(problem.adapters)):
            there, here = extract(problem.bank, slot, "it"), extract(stage, slot, "it")
            for key, weights in there.weights.items():
                for expert in np.flatnonzero(weights.ranks):
                    np.testing.assert_array_equal(here.weights[key].delta(expert), weights.delta(expert))


def test_a_region_that_is_full_is_said_so():
    config = CONFIGS["qwen3_moe"]
    sites = split_sites(config, {"gate": layer_sites(config)["gate"]}, mesh_of(expert=2))
    bank = create_bank(sites, 2, 16, None, "float32")
    owners = [np.array(ids) for ids in bank.owners]
    owners[0][len(owners[0]) // 2 + 1 :] = 1  # the second region is taken
    bank = replace(bank, owners=tuple(map(jnp.asarray, owners)))
    with pytest.raises(BankFullError, match="on the devices of its experts too few"):
        insert(bank, 0, random_adapter("per_expert", {"gate": sites["gate"]}, 0, rank=4))
