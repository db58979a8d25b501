"""Each backend's matmul kernels, called alike, for jax's GPU interpreter: small shapes, no GPU needed.

Plans and lists of steps are those that the tests of their kernels expect. The interpreter takes longer over these than
over the matmul, so one case alone has the kernels make them.

Memory that a kernel has not written reads as NaN there, and so do pages that nobody owns. `plgpu.mma` has no rule for a
CPU, so it gets one here.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import mlir

from pallas_kernels.grouped_matmul import hopper, portable
from pallas_kernels.hopper.tuning import HopperConfig
from pallas_kernels.lora_steps.api import LoRASteps
from pallas_kernels.ops import LayerPages, RoutingPlan, make_plan
from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs
from support.lora_steps import steps_by_definition
from support.paged import PagedLayer, PagedSpec, draw_layer

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
RANKS = (4, 16, 17, 40)
CONFIGS = {
    "8 rows": HopperConfig(8, 3, num_sms=2, apart=True),
    "one warpgroup": HopperConfig(16, 4, 1, num_sms=3, apart=True),
    "24 rows": HopperConfig(24, 2, num_sms=3, apart=True),
    "as wide as a tile has rows": HopperConfig(48, 2, num_sms=2, apart=True, widths=(8, 16)),
    "128 rows": HopperConfig(128, 3, num_sms=2, apart=True, widths=(64,)),
}


def multiply_on_cpu(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """16 elements of K at a time, in float32, as the instruction does."""
    for k in range(0, a.shape[1], 16):
        acc = acc + jnp.dot(a[:, k : k + 16].astype(jnp.float32), b[k : k + 16].astype(jnp.float32))
    return acc


OPERANDS = jnp.zeros((16, 8)), jnp.zeros((16, 16), "bfloat16"), jnp.zeros((16, 8), "bfloat16")
MMA = jax.make_jaxpr(plgpu.mma)(*OPERANDS).eqns[0].primitive  # jax exports the function alone
mlir.register_lowering(MMA, mlir.lower_fun(multiply_on_cpu, multiple_results=False), platform="cpu")


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def plan_by_xla(*arguments) -> RoutingPlan:
    with ExitStack() as stack:
        for kernel in (hopper_few_pairs, hopper_many_pairs):
            stack.enter_context(mock.patch.object(kernel, "runs", return_value=False))
        return make_plan(*arguments)


@dataclass(frozen=True)
class Kernels:
    """The matmul kernels of one backend.

    Attributes:
      spec: the layer that they are tried on.
      config: how the Hopper kernels cut their work; None for portable, which takes its own heuristic.
      whole: the Hopper kernels make the plan and the steps too, as in a call that is given neither.
    """

    backend: str
    spec: PagedSpec
    config: HopperConfig | None = None
    whole: bool = False

    @property
    def layer(self) -> PagedLayer:
        return draw_once(self.spec)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.spec.dtype]

    def plan(self, layer: PagedLayer, slots: jax.Array | None = None) -> RoutingPlan:
        spec, slots = layer.spec, layer.slots if slots is None else slots
        tile_rows = None if self.config is None else self.config.tile_rows
        return (make_plan if self.whole else plan_by_xla)(
            layer.chosen, slots, spec.experts, spec.slots, self.backend, tile_rows
        )

    def steps(self, plan: RoutingPlan, pages: LayerPages, slots: jax.Array) -> LoRASteps | None:
        """What Hopper's matmul is given as `steps`."""
        listed = self.backend == "hopper" and pages.modules and not self.whole
        return steps_by_definition(plan, pages, slots) if listed else None

    def matmul(
        self,
        x: jax.Array,
        weights: tuple[jax.Array, ...],
        plan: RoutingPlan,
        pages: LayerPages,
        activation: str = "silu",
        biases: tuple[jax.Array, ...] | None = None,
        **options,
    ) -> jax.Array:
        """The backend's own function, whatever GPU is here: without one the op itself would refuse."""
        defaults = {"of_tokens": True, "steps": None}
        common = self._options(pages, activation, biases or (None,) * len(weights)) | defaults | options
        return self._module.grouped_matmul(x, weights, plan, **common)

    def gated_products(self, rows: jax.Array, weights, plan: RoutingPlan, pages: LayerPages, activation, biases, steps):
        """The gated rows and both factors, of rows in sorted order."""
        options = self._options(pages, activation, biases)
        return self._module.gated_products(rows, weights, plan, steps=steps, **options)

    @property
    def _module(self):
        return {"hopper": hopper, "portable": portable}[self.backend]

    def _options(self, pages: LayerPages, activation: str, biases) -> dict:
        config = {} if self.config is None else {"config": self.config}
        return {"adapters": pages, "activation": activation, "biases": biases} | config

    def run(self, layer: PagedLayer, modules: tuple[str, ...], slots=None, adapters=None) -> np.ndarray:
        """One projection's rows by pair `[P, out]`."""
        slots = layer.slots if slots is None else slots
        pages = (layer.adapters if adapters is None else adapters).select(*modules)
        plan = self.plan(layer, slots)
        weights = tuple(getattr(layer.experts, m) for m in modules)
        steps = self.steps(plan, pages, slots)
        return by_pair(self.matmul(inputs(layer, modules), weights, plan, pages, steps=steps), plan)


WHOLE = "8 rows"
HOPPER = {
    name: Kernels("hopper", PagedSpec(14, 192, 192, 3, 2, ranks=RANKS), own, whole=name == WHOLE)
    for name, own in CONFIGS.items()
}
PORTABLE = Kernels("portable", PagedSpec(14, 128, 192, 3, 2, ranks=RANKS))


@cache
def draw_once(spec: PagedSpec, seed: int = 0) -> PagedLayer:
    return draw_layer(spec, np.random.default_rng(seed))


def inputs(layer: PagedLayer, modules: tuple[str, ...]) -> jax.Array:
    width = getattr(layer.experts, modules[0]).shape[2]
    return jax.random.normal(jax.random.key(0), (layer.spec.tokens, width), layer.spec.dtype)


def by_pair(rows: jax.Array, plan: RoutingPlan) -> np.ndarray:
    return np.asarray(rows.astype(jnp.float32))[np.asarray(plan.position)]


def expected(layer: PagedLayer, modules: tuple[str, ...]) -> np.ndarray:
    """What `Kernels.run` gives, by loops in float64."""
    x = np.asarray(inputs(layer, modules).astype(jnp.float32), np.float64)
    out = []
    for t, experts in enumerate(np.asarray(layer.chosen)):
        for expert in experts:
            values = [layer._linear(x[t], m, int(layer.slots[t]), int(expert)) for m in modules]
            out.append(values[0] if len(values) == 1 else values[0] / (1 + np.exp(-values[0])) * values[1])
    return np.stack(out)


def relative_error(actual: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))
