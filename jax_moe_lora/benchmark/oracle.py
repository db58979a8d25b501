"""The expected result of the layer: in float32, one matrix times one vector at a time, with none of the layer's code.

It runs on the device, because the weights are there: a Mixtral expert takes 0.7 GB in float32. The tests compare it
with `jax_moe_lora.layer.reference`. Quantised weights are the numbers that `dequantise` says.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jax_moe_lora.benchmark.problem import Problem
from pallas_kernels.pages import NO_ADAPTERS, RANK_PAGE, LoRAPages
from pallas_kernels.quantised.api import dense

CHECKED = 4  # tokens compared with the oracle


def checked_rows(tokens: int) -> np.ndarray:
    """The tokens that are compared: evenly from the first to the last; some repeat if there are few."""
    return np.linspace(0, tokens - 1, CHECKED).astype(np.int32)


def expected(problem: Problem) -> np.ndarray:
    """The expected result for the checked tokens.

    Args:
      problem: the layer's inputs.

    Returns:
      float32 `[CHECKED, D]`.
    """
    rows = checked_rows(problem.x.shape[0])
    tokens = [values[rows] for values in (problem.x, problem.weights, problem.chosen, problem.slots)]
    return np.asarray(_layer(*tokens, problem.experts, problem.adapters))


def relative_error(y: Array | np.ndarray, problem: Problem) -> float:
    """Relative Frobenius error of a result.

    Args:
      y: `[T, D]`, the layer's result.
      problem: the layer's inputs.

    Returns:
      The error over the checked tokens.
    """
    actual = np.asarray(jnp.asarray(y[checked_rows(problem.x.shape[0])]).astype(jnp.float32))
    wanted = expected(problem)
    return float(np.linalg.norm(actual - wanted) / np.linalg.norm(wanted))


@jax.jit
def _layer(x, weights, chosen, slots, experts, adapters):
    pages = NO_ADAPTERS if adapters is None else adapters

    def pair(values):
        """One token with one of its experts. Called in a loop: only one expert's weights are float32 at a time."""
        row, weight, expert, slot = values

        def linear(module: str, row: Float[Array, "in"]) -> Float[Array, "out"]:
            weight = dense(getattr(experts, module)[expert], jnp.float32).astype(jnp.float32)
            y = _times(weight, row)
            return y if module not in pages else y + _update(pages[module], row, expert, slot)

        gate, up = linear("gate", row), linear("up", row)
        return weight * linear("down", gate / (1 + jnp.exp(-gate)) * up)

    top_k = chosen.shape[1]
    wide = jnp.repeat(x.astype(jnp.float32), top_k, axis=0)
    each = lax.map(pair, (wide, weights.reshape(-1), chosen.reshape(-1), jnp.repeat(slots, top_k)))
    return each.reshape(-1, top_k, x.shape[1]).sum(1)


def _update(pages: LoRAPages, row: Float[Array, "in"], expert: Array, slot: Array) -> Float[Array, "out"]:
    """`scale * B (A row)` of one slot and expert; zero if the slot is negative."""
    first_a, first_b, count, _ = pages.table[slot, expert]
    most = -(-pages.max_rank // RANK_PAGE)
    live = (jnp.arange(most) < count) & (slot >= 0)

    def matrix(pool: Float[Array, "_pages 16 width"], first: Array) -> Float[Array, "R width"]:
        pages_in_use = jnp.where(live[:, None, None], pool[first + jnp.arange(most)], 0)
        return pages_in_use.reshape(most * RANK_PAGE, -1).astype(jnp.float32)

    shrunk = _times(matrix(pages.a, first_a), row)
    return pages.scale[slot, expert] * _times(matrix(pages.b, first_b).T, shrunk)


_times = partial(jnp.matmul, precision=lax.Precision.HIGHEST)  # no TF32
