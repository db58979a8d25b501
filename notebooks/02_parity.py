# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The layer agrees with plain torch
#
# You will see the error of the routed experts with LoRA adapters against a reference, for 24 kinds of adapters and
# three dtypes. The reference is written in plain torch and float32 and follows the definition. Every error is within
# what the rounding of its dtype explains.
#
# To run it: `pip install ".[notebooks,parity]"` in a clone of the repository, which brings torch. A CPU is enough; it
# takes about a minute. `jax-moe-lora parity --shape 32,128,96,8,2` prints the same figures.

# %%
import numpy as np

from jax_moe_lora import MoEConfig, plots
from jax_moe_lora.parity import TOLERANCE, probes, table

plots.show_as_svg()
T = 32  # tokens
config = MoEConfig(hidden_size=128, expert_width=96, num_experts=8, top_k=2)

# %% [markdown]
# ## The probes
#
# A probe is a set of adapters that share a batch. An adapter maps modules to a pair of matrices: A `[E or 1, R, in]`
# and B `[E or 1, out, R]`. A leading 1 means that all experts share the matrix. The probe also lists slots, which the
# tokens take in turn; slot -1 is the base model. "Zeros elsewhere" has the other modules too, with A and B of zeros.

# %%
for probe in probes(config):
    (first, *_) = probe.adapters or [None]
    shapes = {module: (w.a.shape, w.b.shape) for (_, module), w in first.weights.items()} if first else {}
    print(f"{probe.name:37} slots {probe.turn!s:14} {shapes}")

# %% [markdown]
# ## The definition
#
# `torch_reference` takes the top-k expert ids of each token, the router's scores of these experts, and the adapters.
# Nothing of the package is imported by it. This is what it adds to a projection, and what it sums.

# %%
import inspect

from IPython.display import Markdown

from jax_moe_lora.parity import torch_delta, torch_reference

sums = inspect.getsource(torch_reference)
sums = sums[sums.index("    def linear(") :]
delta = inspect.getsource(torch_delta).split('"""')
Markdown(f"```python\n{sums}\n\n{delta[0].rstrip()}{delta[2]}```")

# %% [markdown]
# ## The errors
#
# Both sides get inputs that the dtype represents exactly, so all that differs is the rounding inside the layer. The
# table shows the largest absolute difference, the relative Frobenius error and the cosine. The figure shows the
# relative error of each probe, and as dotted lines the tolerance of each dtype.

# %%
rows = table(config, T)
names = list(dict.fromkeys(row.probe for row in rows))
errors = {(row.probe, row.dtype): row.difference for row in rows}
lines = [
    "| probe |" + "".join(f" {dtype}: max abs | relative | cosine |" for dtype in TOLERANCE),
    "|---" * (1 + 3 * len(TOLERANCE)) + "|",
]
for name in names:
    cells = [errors[name, dtype] for dtype in TOLERANCE]
    lines.append(f"| {name} |" + "".join(f" {d.max_abs:.1e} | {d.relative:.1e} | {d.cosine:.7f} |" for d in cells))
print(f"{sum(row.within for row in rows)} of {len(rows)} errors are within the tolerance of their dtype")
Markdown("\n".join(lines))

# %%
relative = {dtype: np.array([errors[name, dtype].relative for name in names]) for dtype in TOLERANCE}
axes = plots.parity(relative, names, TOLERANCE)

# %% [markdown]
# ## What is exact
#
# Three results are equal bit for bit, in every dtype: an adapter of zeros and no adapter; a row without an adapter
# beside rows with one and the same row in a batch without adapters; a shared matrix and one copy of it per expert.

# %%
import jax
import jax.numpy as jnp

from jax_moe_lora import ExpertWeights, create_bank, insert, routed_experts
from jax_moe_lora.inspect import difference
from jax_moe_lora.nn import moe_sites
from jax_moe_lora.parity import expand_shared, random_inputs, shared_adapter

inputs = random_inputs(config, T)
layer = jax.jit(routed_experts, static_argnames="config")


def run(adapters, slots, dtype):
    bank = create_bank(moe_sites(config), num_slots=1, max_rank=8, dtype=dtype)
    for slot, adapter in enumerate(adapters):
        bank = insert(bank, slot, adapter)
    x, slots = jnp.asarray(inputs.x, dtype), jnp.asarray(slots, jnp.int32)
    experts = ExpertWeights(**{module: jnp.asarray(w, dtype) for module, w in inputs.experts.items()})
    return layer(x, jnp.asarray(inputs.weights), jnp.asarray(inputs.chosen), experts, config, bank.layer(0), slots)


zero = next(probe for probe in probes(config) if probe.name == "zero B").adapters
shared, half, nobody = shared_adapter(config), np.resize([0, -1], T), np.full(T, -1)
for dtype in TOLERANCE:
    without, mixed = run([], nobody, dtype), run([shared], half, dtype)
    print(
        f"{dtype:9} zero adapter: {difference(run(zero, nobody * 0, dtype), without).equal},"
        f" base rows: {difference(mixed[1::2], without[1::2]).equal},"
        f" shared equals copies: {difference(run([expand_shared(shared)], half, dtype), mixed).equal}"
    )
