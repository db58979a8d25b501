"""Quantised checkpoints on one device and on a mesh: logits with adapters of every layout, and a step of training."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe_lora import InputError, Model
from jax_moe_lora.adapters import bank as banks
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.training import AdapterSpec, Batch, init_params, init_state, make_step, step_layout
from pallas_kernels.ops import Quantised
from support import quantised_files as files
from support.checkpoints import TINY, expected_shapes, write
from support.meshes import LAYOUTS, random_adapter, relative, report

SIZES = TINY | {
    "num_hidden_layers": 1,
    "mlp_only_layers": [],
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "head_dim": 32,
    "num_experts": 4,
}
SETTINGS: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "fp8_block": (SETTINGS | {"weight_block_size": [32, 32]}, files.fp8_block),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, files.nvfp4_modelopt),
    "int4_zero": ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}, files.awq),
}
TOKENS = np.random.default_rng(1).integers(0, 32, (6, 4)).astype(np.int32)
NAMES = [None, *LAYOUTS, "fused"]
SPECS = {"x": AdapterSpec(4, targets=("gate", "up", "down", "q", "o", "router"))}
OPTIMIZERS = {"x": optax.sgd(1.0)}


def written(folder: Path, name: str, **changes: int) -> Path:
    rng, sizes = np.random.default_rng(0), SIZES | changes
    shapes = expected_shapes(sizes)
    tensors = {key: 0.2 * rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    folder.mkdir()
    settings, writer = FORMATS[name]
    return files.write(folder, sizes, tensors, settings, writer)[0]


def load(folder: Path, mesh: str | None, quantise: str | None = None) -> Model:
    sizes = {"max_adapters": 4, "max_rank": 32}
    model = Model.from_pretrained(folder, dtype="float32", mesh=mesh, quantise=quantise, **sizes)  # type: ignore[arg-type]
    for seed, layout in enumerate(LAYOUTS):
        model.load_adapter(random_adapter(layout, layer_sites(model.config), seed), layout)
    return model


def trained(model: Model, mesh: str | None) -> list[np.ndarray]:
    """What a step of plain descent changes of an adapter: its gradients."""
    layout, sites = step_layout(model.config, SPECS, mesh), layer_sites(model.config)
    rng = np.random.default_rng(2)
    drawn = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(scale=0.2, size=x.shape), jnp.float32),
        {"x": init_params(SPECS["x"], sites, jax.random.key(0))},
    )
    before = [np.asarray(leaf) + 0 for leaf in jax.tree.leaves(drawn)]
    rows = jnp.asarray(TOKENS[:4])
    ones, at = jnp.ones_like(rows), jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[None], rows.shape)
    batch = Batch(rows, at, ones, 0 * ones, rows[:, ::-1], jnp.ones(rows.shape, jnp.float32))
    step = make_step(model.config, SPECS, OPTIMIZERS, mesh=mesh)
    state, _ = step(init_state(drawn, OPTIMIZERS, layout.placements), model.params, batch)
    return [np.asarray(leaf) - old for leaf, old in zip(jax.tree.leaves(state.params), before, strict=True)]


def share(model: Model) -> dict[str, float]:
    """What the first device has of each array of the experts' weights."""
    weight = model.params.layers[0]["down"]
    assert isinstance(weight, Quantised)
    arrays = {name: value for name, value in vars(weight).items() if isinstance(value, jax.Array)}
    return {name: value.addressable_shards[0].data.size / value.size for name, value in arrays.items()}


def of_16_bits(folder: Path, mesh: str) -> float:
    """The error on a mesh of a checkpoint that is quantised while it is read."""
    folder.mkdir()
    write(folder, **{name: value for name, value in SIZES.items() if name not in TINY or TINY[name] != value})
    one, split = (load(folder, where, "int4") for where in (None, mesh))
    assert isinstance(split.params.layers[0]["down"], Quantised)
    return relative(split.logits(TOKENS, NAMES), one.logits(TOKENS, NAMES))


def refused(folder: Path, mesh: str) -> str:
    allocated, banks.placed_zeros = banks.placed_zeros, None  # nothing may be made
    try:
        Model.from_pretrained(folder, dtype="float32", mesh=mesh)
    except InputError as error:
        return str(error)
    finally:
        banks.placed_zeros = allocated
    return ""


if __name__ == "__main__":
    banks.compile_updates = lambda *_: None  # nothing is counted here
    for number, name in enumerate(sys.argv[3:]):
        folder = written(Path(sys.argv[1]) / name, name)
        one, split = load(folder, None), load(folder, sys.argv[2])
        steps = (
            {}
            if number
            else {
                "read": of_16_bits(Path(sys.argv[1]) / "float32", sys.argv[2]),
                "trained": max(map(relative, trained(split, sys.argv[2]), trained(one, None))),
                "refused": refused(written(Path(sys.argv[1]) / "narrow", name, head_dim=16), "tensor=2"),
            }
        )
        error = relative(split.logits(TOKENS, NAMES), one.logits(TOKENS, NAMES))
        report(format=name, error=error, share=share(split), **steps)
