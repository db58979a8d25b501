"""The contract of the grouped matmul, and its dispatch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activations import ACTIVATIONS, Activation
from pallas_kernels.backend import Implementation, choose
from pallas_kernels.grouped_lora.api import grouped_lora
from pallas_kernels.grouped_lora.pages import LoRAPages
from pallas_kernels.grouped_matmul import fused, reference, xla
from pallas_kernels.plan import RoutingPlan

_MATMUL = {"xla": xla.grouped_matmul, "reference": reference.grouped_matmul}


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: Float[Array, "E out in"] | tuple[Float[Array, "E out in"], Float[Array, "E out in"]],
    plan: RoutingPlan,
    *,
    of_tokens: bool = False,
    adapters: tuple[LoRAPages | None, ...] = (),
    activation: Activation = "silu",
    dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation | None = None,
) -> Float[Array, "Q out"]:
    """`y[r] = lin(W; x[r])` for each sorted row r of the plan, or for a pair of weights the gated product
    `activation(lin(W0; x[r])) * lin(W1; x[r])`; `lin(W; x) = x @ W[e].T`, plus the update of the row's adapter.

    Args:
      x: `[Q, in]`, sorted rows; or `[T, in]`, a row a token, with `of_tokens`.
      weights: `[E, out, in]`, one matrix an expert, of x's dtype; or a pair of these.
      adapters: for each weight its adapters, or None; empty for none at all.
      activation: of the gated product. dtype: of the result; sums are kept in float32.
      implementation: a backend by name, or None for the best that is available.

    Returns:
      `[Q, out]`. Rows that the plan skips, or that lie between two experts, hold anything. A row's bits depend on its
      own inputs, its own adapter and on static shapes alone; rows without an adapter have those of `adapters=()`.

    Raises:
      UnsupportedImplementation: see `backend.choose`.
    """
    several = weights if isinstance(weights, tuple) else (weights,)
    pages = adapters or (None,) * len(several)
    picked = choose(implementation, dtype=x.dtype, widths=several[0].shape[1:], result=dtype).picked
    if picked == "hopper":
        return fused.grouped_matmul(x, several, plan, of_tokens, pages, activation)
    row_index = plan.token if of_tokens else None

    def project(weight: Array, own: LoRAPages | None) -> Array:
        y = _MATMUL[picked](x, weight, plan, row_index)
        return y if own is None else grouped_lora(y, x, own, plan, row_index, picked)

    products = [project(weight, own) for weight, own in zip(several, pages, strict=True)]
    y = products[0] if len(products) == 1 else ACTIVATIONS[activation](products[0]) * products[1]
    return y.astype(dtype)
