"""One decoder layer on one device and on meshes: a line of JSON for each mesh that is named."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.adapters import bank as banks
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.mesh.rules import parts
from jax_moe_lora.mesh.steps import over_mesh
from jax_moe_lora.models import decoder
from jax_moe_lora.models.sites import layer_sites
from support.meshes import (
    LAYOUTS,
    collectives,
    make_model,
    predicted_bytes,
    random_adapter,
    random_params,
    relative,
    report,
    same,
    summed_bytes,
)
from support.models import decoder_config

MOE = MoEConfig(32, 32, 8, 2, activation="clamped_swiglu", expert_bias=True)
CONFIG = decoder_config("qwen2_moe", 16, 32, (8, 8, 4), MOE, (True,), shared_width=64, biases="qkvo", sinks=True)
SLOTS = np.array([-1, 0, 1, 2, 3, 1, -1, 2], np.int32)
TOKENS = np.random.default_rng(1).integers(0, 16, (8, 4)).astype(np.int32)
LENGTHS = np.array([4, 4, 3, 4, 1, 4, 2, 4], np.int32)
REAL = np.arange(4)[None, :] < LENGTHS[:, None]
ROUTED = np.full((8, 4, 1, 2), -1, np.int32)
ON_ONE_EXPERT = np.full((8, 4, 1, 2), 5, np.int32)


class Layer:
    """The layer on a mesh, compiled once."""

    def __init__(self, mesh: str | None):
        self.model = make_model(CONFIG, PARAMS, mesh)
        for adapter in ADAPTERS:
            self.model.load_adapter(adapter, adapter.name)
        step = jax.jit(partial(over_mesh(decoder.hidden, self.model.mesh), config=CONFIG))
        self.bank = self.model.functional(8, 4).bank
        self.lower = partial(step.lower, self.model.params)
        self.program = self.lower(self.bank, TOKENS, LENGTHS, SLOTS, ROUTED).compile()
        self.collectives = collectives(self.program.as_text())
        self.summed = summed_bytes(self.program.as_text())

    def __call__(self, slots: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        rows = (jnp.asarray(x) for x in (TOKENS, LENGTHS, slots, chosen))
        return np.asarray(self.program(self.model.params, self.bank, *rows))[REAL]

    def without_bank(self) -> tuple[np.ndarray, dict[str, int]]:
        program = self.lower(None, TOKENS, LENGTHS, SLOTS, ROUTED).compile()
        y = program(self.model.params, None, TOKENS, LENGTHS, SLOTS, ROUTED)
        return np.asarray(y)[REAL], collectives(program.as_text())


def contracts(layer: Layer, mixed: np.ndarray) -> dict[str, object]:
    """Base rows are exact, mixed equals solo, and adapters add no collective."""
    base, of_base = layer.without_bank()
    slot_of_row = np.broadcast_to(SLOTS[:, None], REAL.shape)[REAL]
    solo = [layer(np.where(slot == SLOTS, SLOTS, -1), ROUTED) for slot in range(len(ADAPTERS))]
    return {
        "base_is_exact": same(mixed[slot_of_row < 0], base[slot_of_row < 0]),
        "mixed_is_solo": all(same(mixed[slot_of_row == s], y[slot_of_row == s]) for s, y in enumerate(solo)),
        "adapters_matter": bool((mixed[slot_of_row >= 0] != base[slot_of_row >= 0]).any(axis=-1).all()),
        "without_adapters": of_base,
    }


if __name__ == "__main__":
    banks.compile_updates = lambda *_: None  # nothing is counted here
    PARAMS = random_params(CONFIG)
    ADAPTERS = [random_adapter(layout, layer_sites(CONFIG), seed) for seed, layout in enumerate(LAYOUTS)]
    one = Layer(None)
    wanted = one(SLOTS, ROUTED), one(SLOTS, ON_ONE_EXPERT)
    for number, name in enumerate(sys.argv[1:]):
        jax.config.update("jax_disable_most_optimizations", number >= 2)  # the first two compare bits
        layer = Layer(name)
        got = layer(SLOTS, ROUTED), layer(SLOTS, ON_ONE_EXPERT)
        report(
            mesh=name,
            error=relative(got[0], wanted[0]),
            on_one_expert=relative(got[1], wanted[1]),
            routing_matters=relative(wanted[1], wanted[0]),
            collectives=layer.collectives,
            summed=layer.summed,
            predicted=predicted_bytes(CONFIG, name, TOKENS.size // parts(layer.model.mesh, "data")),
            **(contracts(layer, got[0]) if number < 2 else {}),
        )
