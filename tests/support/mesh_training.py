"""Steps of training one layer on one device and on meshes: a line of JSON for each mesh that is named."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.training import AdapterSpec, Batch, Metrics, TrainState, init_params, init_state, make_step
from jax_moe_lora.training.checkpoint import Checkpoints
from jax_moe_lora.training.layout import step_layout
from support.meshes import collectives, random_params, relative, report
from support.models import decoder_config

MOE = MoEConfig(32, 32, 8, 2, activation="clamped_swiglu", expert_bias=True)
CONFIG = decoder_config("qwen2_moe", 16, 32, (8, 8, 4), MOE, (True,), shared_width=64, biases="qkvo", sinks=True)
SHARED = ("shared_gate", "shared_down", "shared_expert_gate")
SPECS = {
    "fused": AdapterSpec(4, targets=("gate", "up", "down", "q", "o")),
    "experts": AdapterSpec(18, layout="per-expert", targets=("k", "v", "gate", "up", "down", "router")),
    "outer": AdapterSpec(6, layout="shared-outer", targets=("gate", "up", "down", *SHARED)),
}
# The first keeps its gradient as it is, for a comparison of each matrix.
OPTIMIZERS = {
    "fused": optax.sgd(0.2, momentum=0.9),
    "experts": optax.sgd(0.2, momentum=0.9),
    "outer": optax.adamw(1e-2, weight_decay=0.1),
}
STEPS, ROWS, WIDTH, PARTS = 3, 16, 6, 2


def batch(seed: int) -> Batch:
    """Rows of two examples, the second one short in some; every third row has no adapter."""
    rng = np.random.default_rng(seed)
    numbers = {name: rng.integers(0, 16, (ROWS, WIDTH)).astype(np.int32) for name in ("tokens", "targets")}
    positions = np.tile(np.arange(WIDTH, dtype=np.int32) % 3, (ROWS, 1))
    segments = np.tile(1 + np.arange(WIDTH, dtype=np.int32) // 3, (ROWS, 1))
    segments[::4, 4:] = 0
    slots = np.repeat(np.arange(ROWS, dtype=np.int32) % 4 - 1, WIDTH).reshape(ROWS, WIDTH)
    weights = rng.integers(0, 2, (ROWS, WIDTH)).astype(np.float32)
    slots, weights = np.where(segments > 0, slots, -1), np.where(segments > 0, weights, 0)
    return jax.tree.map(
        jnp.asarray, Batch(positions=positions, segments=segments, slots=slots, weights=weights, **numbers)
    )


class Run:
    """A step on a mesh, and what some of them make of the adapters."""

    def __init__(self, mesh: str | None):
        self.layout = step_layout(CONFIG, SPECS, mesh)
        self.model = jax.device_put(random_params(CONFIG), self.layout.model_placement)
        options = {"clip": {"outer": 1e-2}, "router_loss": 0.5, "micro_batches": PARTS, "mesh": mesh}
        step = make_step(CONFIG, SPECS, OPTIMIZERS, **options)
        # One program for all steps: it refuses a state that lies elsewhere than the first one.
        self.program = step.lower(self.first(), self.model, batch(0)).compile()

    def first(self) -> TrainState:
        sites = layer_sites(CONFIG)
        params = {
            name: init_params(replace(spec, init="gaussian"), sites, jax.random.key(seed))
            for seed, (name, spec) in enumerate(SPECS.items())
        }
        rng = np.random.default_rng(0)
        made = jax.tree.map(lambda x: jnp.asarray(rng.normal(scale=0.2, size=x.shape), jnp.float32), params)
        return init_state(made, OPTIMIZERS, self.layout.placements)

    def __call__(self, state: TrainState, seeds: range) -> tuple[TrainState, list[Metrics]]:
        seen = []
        for seed in seeds:
            state, metrics = self.program(state, self.model, batch(seed))
            seen.append(jax.device_get(metrics))
        return state, seen


def errors(actual: Any, expected: Any) -> dict[str, float]:
    """The error of each array by its path, and the largest of them."""
    flat = jax.tree_util.tree_flatten_with_path(expected)[0]
    pairs = zip(jax.tree.leaves(actual), flat, strict=True)
    by_path = {jax.tree_util.keystr(path): relative(one, other) for one, (path, other) in pairs if other.any()}
    worst = max(by_path, key=by_path.__getitem__)
    return {worst: by_path[worst]}


def share(state: TrainState) -> dict[str, float]:
    """What the first device has of the matrices of routed experts, moments included."""
    parts: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        if leaf.ndim == 3:
            side = name.rsplit("0.", 1)[1].rstrip("']")
            one, whole = parts.setdefault(f"{name.split(chr(39))[1]} {side}", [0, 0])
            here = leaf.addressable_shards[0].data.nbytes
            parts[f"{name.split(chr(39))[1]} {side}"] = [one + here, whole + leaf.nbytes]
    return {name: one / whole for name, (one, whole) in parts.items()}


def continued(run: Run, folder: Path) -> bool:
    """Whether a checkpoint's state lies where it lay, and goes on with the same bits."""
    state, _ = run(run.first(), range(1))
    settings: Mapping[str, Any] = {"seed": 0}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, settings)
        restored = checkpoints.restore(run.first(), settings)
    assert restored is not None
    places = [[leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in (state, restored[1])]
    ends = [jax.device_get(run(tree, range(1, 2))[0]) for tree in (state, restored[1])]
    bits = [[leaf.tobytes() for leaf in jax.tree.leaves(end)] for end in ends]
    return places[0] == places[1] and bits[0] == bits[1]


if __name__ == "__main__":
    one = Run(None)
    begin = one.first().params
    first = jax.device_get(one(one.first(), range(1))[0])
    last, figures = jax.device_get(one(one.first(), range(STEPS)))
    for number, name in enumerate(sys.argv[2:]):
        run = Run(name)
        state, _ = run(run.first(), range(1))
        moments = errors(state.optimizer_states, first.optimizer_states)
        state, metrics = run(run.first(), range(STEPS))
        report(
            mesh=name,
            gradients=moments,
            params=errors(state.params, last.params),
            metrics=errors(metrics, figures),
            moved=min(jax.tree.leaves(jax.tree.map(relative, state.params, begin))),
            share=share(state),
            continued=number > 0 or continued(run, Path(sys.argv[1])),
            collectives=collectives(run.program.as_text()),
        )
