"""The demo model, adapters to train on it, and batches of its tasks."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe_lora.demo import tasks
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.decoder import layer_sites
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training import AdapterSpec, Batch, Params, TrainState, init_params, init_state
from pallas_kernels.ops import BASE_SLOT

MODEL = Path(str(files("jax_moe_lora.demo") / "data" / "model"))
CONFIG: ModelConfig = read_model_config(MODEL)
SITES = layer_sites(CONFIG)
EOS = 2
# Layouts, ranks, scales and targets that differ in every way.
SPECS = {
    "upper": AdapterSpec(rank=4, alpha=8),
    "reverse": AdapterSpec(
        rank=18,
        alpha=9,
        layout="per-expert",
        targets=("q", "v", "gate", "up", "down", "router"),
        rank_stabilised=True,
        init="gaussian",
        ranks=(("router", 3), ("up", 5)),
    ),
    "sort": AdapterSpec(rank=6, alpha=12, layout="shared-outer", targets=("o", "down", "gate", "up")),
}


@cache
def model(dtype: str = "float32") -> ModelParams:
    return load_params(MODEL, CONFIG, dtype)


def shallow(layers: int = 1) -> tuple[ModelConfig, ModelParams]:
    """The demo model's first layers, for what does not need depth."""
    config = replace(CONFIG, layers=CONFIG.layers[:layers])
    return config, replace(model(), layers=model().layers[:layers])


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL)


def new_params(
    specs: Mapping[str, AdapterSpec] = SPECS, trained: bool = False, config: ModelConfig = CONFIG
) -> dict[str, Params]:
    """Params of new adapters; `trained` ones have a random B too, so that they change what the model says."""
    sites = layer_sites(config)
    made = {name: init_params(spec, sites, jax.random.key(seed)) for seed, (name, spec) in enumerate(specs.items())}
    if trained:
        rng = np.random.default_rng(0)
        made = {
            name: {key: value if key.endswith(".a") else draw(rng, value.shape) for key, value in own.items()}
            for name, own in made.items()
        }
    return made


def draw(rng: np.random.Generator, shape: Sequence[int], deviation: float = 0.1) -> jax.Array:
    return jnp.asarray(deviation * rng.standard_normal(shape), jnp.float32)


def state_of(params: Mapping[str, Params], optimizers: Mapping[str, optax.GradientTransformation]) -> TrainState:
    """A state with arrays of its own, which a step may take."""
    return init_state(jax.tree.map(jnp.copy, dict(params)), optimizers)


def task_batch(names: Sequence[str | None], seed: int, rows: int, width: int = 20, specs=SPECS) -> Batch:
    """Padded rows of the demo's tasks in turn; None for rows without an example."""
    rng = random.Random(seed)
    batch = {key: np.zeros((rows, width), np.int32) for key in ("tokens", "positions", "segments", "targets")}
    slots, weights = np.full((rows, width), BASE_SLOT, np.int32), np.zeros((rows, width), np.float32)
    for row in range(rows):
        # A draw for every row, so that the rows of one name do not depend on which others are there.
        text = tasks.random_string(rng, rng.randint(tasks.MIN_LENGTH, tasks.MAX_LENGTH))
        name = names[row % len(names)]
        if name is None:
            continue
        ids = [*tokenizer().encode(tasks.prompt(text) + tasks.TASKS[name](text)), EOS]
        count = len(ids) - 1
        batch["tokens"][row, :count], batch["targets"][row, :count] = ids[:-1], ids[1:]
        batch["positions"][row, :count], batch["segments"][row, :count] = np.arange(count), 1
        slots[row, :count], weights[row, len(text) : count] = [*specs].index(name), 1
    return Batch(
        *map(jnp.asarray, (*[batch[k] for k in ("tokens", "positions", "segments")], slots)),
        jnp.asarray(batch["targets"]),
        jnp.asarray(weights),
    )


def arrays(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same_bits(one, other) -> bool:
    pairs = zip(arrays(one), arrays(other), strict=True)
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
