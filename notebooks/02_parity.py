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
# You will see the error of the MoE layer with LoRA adapters against a reference, for 15 kinds of adapters and three
# dtypes. The reference is written in plain torch and float32 and follows the definition: one token and one expert at a
# time. Every error is within what the rounding of its dtype explains.
#
# To run it: `pip install ".[notebooks,parity]"` in a clone of the repository, which brings torch. A CPU is enough; it
# takes about a minute.

# %%
import jax
import jax.numpy as jnp
import numpy as np

T, D, F, E, K = 32, 128, 96, 8, 2  # tokens, model width, expert width, experts, experts per token
WIDTHS = {"gate": (F, D), "up": (F, D), "down": (D, F)}  # module -> (out, in)
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # relative Frobenius error
SCALE = 2.0  # of every adapter

rng = np.random.default_rng(0)
x, router = rng.normal(size=(T, D)), rng.normal(size=(E, D))
base = {module: rng.normal(size=(E, *size)) * size[1] ** -0.5 for module, size in WIDTHS.items()}

# %% [markdown]
# ## The probes
#
# A probe is a set of adapters that share a batch. An adapter maps modules to a pair of matrices: A `[E or 1, R, in]`
# and B `[E or 1, out, R]`. A leading 1 means that all experts share the matrix. The probe also lists slots, which the
# tokens take in turn; slot -1 is the base model.


# %%
def random_adapter(*modules, rank=8, shared=()):
    """Module -> (A, B); `shared` names the sides that all experts share, such as `gate.a`."""
    adapter = {}
    for module in modules:
        out_width, in_width = WIDTHS[module]
        a = rng.normal(size=(1 if f"{module}.a" in shared else E, rank, in_width)) * in_width**-0.5
        b = rng.normal(size=(1 if f"{module}.b" in shared else E, out_width, rank)) * rank**-0.5
        adapter[module] = a, b
    return adapter


def with_growing_ranks(adapter):
    """Expert e keeps rank e: 0 for the first, 7 for the last."""
    keep = np.arange(8) < np.arange(E)[:, None]
    return {module: (a * keep[:, :, None], b * keep[:, None, :]) for module, (a, b) in adapter.items()}


every = random_adapter("gate", "up", "down")
outer = random_adapter("gate", "up", "down", shared=("gate.a", "up.a", "down.b"))
four_ranks = [random_adapter("gate", "up", "down", rank=rank) for rank in (3, 8, 16, 40)]
PROBES = {  # name -> the adapters in slots 0, 1, ..., and the slots that the tokens take in turn
    "none": ([{}], [0]),
    "zero": ([{module: (a, 0 * b) for module, (a, b) in every.items()}], [0]),
    "gate": ([random_adapter("gate")], [0]),
    "up": ([random_adapter("up")], [0]),
    "down": ([random_adapter("down")], [0]),
    "gate, up": ([random_adapter("gate", "up")], [0]),
    "gate, down": ([random_adapter("gate", "down")], [0]),
    "up, down": ([random_adapter("up", "down")], [0]),
    "gate, up, down": ([every], [0]),
    "up aliased to gate": ([{**every, "up": every["gate"]}], [0]),
    "fused: one A for gate and up": ([{**every, "up": (every["gate"][0], every["up"][1])}], [0]),
    "ranks 0 to 7, by expert": ([with_growing_ranks(every)], [0]),
    "shared outer sides": ([outer], [0]),
    "ranks 3, 8, 16, 40 mixed": (four_ranks, [0, 1, 2, 3]),
    "half base rows": ([every, outer], [0, -1, 1, -1]),
}

# %% [markdown]
# ## The reference
#
# A SwiGLU expert for each token and each of its top-k experts. Each linear map is `W x + scale * B (A x)`.

# %%
import torch


def reference(x, router, base, adapters, slots):
    y = torch.zeros_like(x)
    weights, chosen = torch.softmax(x @ router.T, -1).topk(K)
    for t, k in np.ndindex(T, K):
        e, adapter = int(chosen[t, k]), adapters[slots[t]] if slots[t] >= 0 else {}

        def linear(module, row, e=e, adapter=adapter):
            a, b = adapter.get(module, (torch.zeros(1, 1, len(row)), torch.zeros(1, 1, 1)))
            return base[module][e] @ row + SCALE * b[e % len(b)] @ (a[e % len(a)] @ row)

        hidden = torch.nn.functional.silu(linear("gate", x[t])) * linear("up", x[t])
        y[t] += weights[t, k] * linear("down", hidden)
    return y.numpy()


# %% [markdown]
# ## The layer
#
# The adapters of a probe are inserted into a bank, the device arrays that hold all adapters. The bank and the slot of
# each token are ordinary arguments of the jitted layer.

# %%
from jax_moe_lora import ExpertWeights, LoRAAdapter, LoRAWeights, MoEConfig, create_bank, insert, moe_lora, plots
from jax_moe_lora.nn import moe_sites

plots.show_as_svg()
config = MoEConfig(hidden_size=D, expert_width=F, num_experts=E, top_k=K)
layer = jax.jit(moe_lora, static_argnames=("config",))
empty_banks = {dtype: create_bank(moe_sites(config), num_slots=4, max_rank=48, dtype=dtype) for dtype in TOLERANCE}


def lora_weights(a, b):
    ranks = np.broadcast_to((a != 0).any(2).sum(1), E).astype(np.int32)
    return LoRAWeights(a, b, ranks, np.full(E, SCALE, np.float32))


def run(x, router, base, adapters, slots, dtype):
    bank = empty_banks[dtype]
    for slot, adapter in enumerate(adapters):
        if adapter:
            weights = {(0, module): lora_weights(*sides) for module, sides in adapter.items()}
            bank = insert(bank, slot, LoRAAdapter("probe", weights))
    x, router = jnp.asarray(x, dtype), jnp.asarray(router, dtype)
    experts = ExpertWeights(**{module: jnp.asarray(w, dtype) for module, w in base.items()})
    return np.asarray(layer(x, router, experts, config, bank.layer(0), jnp.asarray(slots, jnp.int32)))


# %% [markdown]
# ## The errors
#
# Both sides get inputs that the dtype represents exactly, so all that differs is the rounding inside the layer. The
# table shows the largest absolute difference, the relative Frobenius error and the cosine. The figure shows the
# relative error of each probe, and as dotted lines the tolerance of each dtype.

# %%
from IPython.display import Markdown

from jax_moe_lora.inspect import difference


def rounded(tree, dtype):
    """Float32 arrays rounded to `dtype`; an aliased matrix stays one object, so that the bank stores it once."""
    by_id = {}

    def round_once(array):
        return by_id.setdefault(id(array), np.asarray(jnp.asarray(array, dtype).astype(jnp.float32)))

    return jax.tree.map(round_once, tree)


errors = {}
for name, (adapters, turn) in PROBES.items():
    slots = np.resize(turn, T)
    for dtype in TOLERANCE:
        inputs = rounded((x, router, base, adapters), dtype)
        expected = reference(*jax.tree.map(torch.tensor, inputs), slots)
        errors[name, dtype] = difference(run(*inputs, slots, dtype), expected)

lines = [
    "| probe |" + "".join(f" {dtype}: max abs | relative | cosine |" for dtype in TOLERANCE),
    "|---" * (1 + 3 * len(TOLERANCE)) + "|",
]
for name in PROBES:
    cells = [errors[name, dtype] for dtype in TOLERANCE]
    lines.append(f"| {name} |" + "".join(f" {d.max_abs:.1e} | {d.relative:.1e} | {d.cosine:.7f} |" for d in cells))
within = [error.relative <= TOLERANCE[dtype] for (_, dtype), error in errors.items()]
print(f"{sum(within)} of {len(within)} errors are within the tolerance of their dtype")
Markdown("\n".join(lines))

# %%
relative = {dtype: np.array([errors[name, dtype].relative for name in PROBES]) for dtype in TOLERANCE}
axes = plots.parity(relative, list(PROBES), TOLERANCE)

# %% [markdown]
# ## What is exact
#
# Three results are equal bit for bit, in every dtype: an adapter of zeros and no adapter; a row without an adapter
# beside rows with one and the same row in a batch without adapters; a shared matrix and one copy of it per expert.

# %%
half, nobody = np.resize([0, -1], T), np.full(T, -1)
copies = {
    module: tuple(np.broadcast_to(side, (E, *side.shape[1:])) for side in sides) for module, sides in outer.items()
}
zero_adapters, _ = PROBES["zero"]
for dtype in TOLERANCE:
    without = run(x, router, base, [], nobody, dtype)
    zero = run(x, router, base, zero_adapters, nobody * 0, dtype)
    mixed = run(x, router, base, [outer], half, dtype)
    copied = run(x, router, base, [copies], half, dtype)
    print(
        f"{dtype:9} zero adapter: {difference(zero, without).equal},"
        f" base rows: {difference(mixed[1::2], without[1::2]).equal},"
        f" shared equals copies: {difference(copied, mixed).equal}"
    )
