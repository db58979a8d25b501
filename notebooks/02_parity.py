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
# # Parity with torch, probe by probe
#
# The layer beside a reference in plain torch and float32 that follows the definition, a token and an expert at a time.
# Each probe is a set of adapters in one batch; each dtype gets inputs that it holds exactly, so what is left is the
# rounding inside the layer. (Needs torch: the `parity` extra.)

# %%
import jax
import jax.numpy as jnp
import numpy as np

T, D, F, E, K = 32, 128, 96, 8, 2
WIDTHS = {"gate": (F, D), "up": (F, D), "down": (D, F)}  # module -> (out, in)
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}  # relative Frobenius error
SCALE = 2.0

rng = np.random.default_rng(0)
x, router = rng.normal(size=(T, D)), rng.normal(size=(E, D))
base = {module: rng.normal(size=(E, *size)) * size[1] ** -0.5 for module, size in WIDTHS.items()}

# %% [markdown]
# ## Probes
#
# An adapter maps modules to A `[E or 1, R, in]` and B `[E or 1, out, R]`: a leading 1 is a matrix that all experts
# share. The tokens go round over a probe's slots; -1 is the base model.


# %%
def lora(*modules, rank=8, shared=()):
    made = {}
    for module in modules:
        out_width, in_width = WIDTHS[module]
        a = rng.normal(size=(1 if f"{module}.a" in shared else E, rank, in_width)) * in_width**-0.5
        b = rng.normal(size=(1 if f"{module}.b" in shared else E, out_width, rank)) * rank**-0.5
        made[module] = a, b
    return made


def cut(adapter):
    """Each expert its own rank, 0 for the first."""
    keep = np.arange(8) < np.arange(E)[:, None]
    return {module: (a * keep[:, :, None], b * keep[:, None, :]) for module, (a, b) in adapter.items()}


every = lora("gate", "up", "down")
outer = lora("gate", "up", "down", shared=("gate.a", "up.a", "down.b"))
ranks = [lora("gate", "up", "down", rank=rank) for rank in (3, 8, 16, 40)]
PROBES = {  # name -> adapters in slots 0, 1, ..., and the slots that the tokens go round over
    "none": ([{}], [0]),
    "zero": ([{module: (a, 0 * b) for module, (a, b) in every.items()}], [0]),
    "gate": ([lora("gate")], [0]),
    "up": ([lora("up")], [0]),
    "down": ([lora("down")], [0]),
    "gate, up": ([lora("gate", "up")], [0]),
    "gate, down": ([lora("gate", "down")], [0]),
    "up, down": ([lora("up", "down")], [0]),
    "gate, up, down": ([every], [0]),
    "up aliased to gate": ([{**every, "up": every["gate"]}], [0]),
    "fused: one A for gate, up": ([{**every, "up": (every["gate"][0], every["up"][1])}], [0]),
    "per-expert ranks 0 to 7": ([cut(every)], [0]),
    "shared outer sides": ([outer], [0]),
    "ranks 3, 8, 16, 40 mixed": (ranks, [0, 1, 2, 3]),
    "half base rows": ([every, outer], [0, -1, 1, -1]),
}

# %% [markdown]
# ## The reference, and the layer

# %%
import torch


def reference(x, router, base, adapters, slots):
    y = torch.zeros_like(x)
    weights, chosen = torch.softmax(x @ router.T, -1).topk(K)
    for t, k in np.ndindex(T, K):
        e, own = int(chosen[t, k]), adapters[slots[t]] if slots[t] >= 0 else {}

        def linear(module, row, e=e, own=own):
            a, b = own.get(module, (torch.zeros(1, 1, len(row)), torch.zeros(1, 1, 1)))
            return base[module][e] @ row + SCALE * b[e % len(b)] @ (a[e % len(a)] @ row)

        hidden = torch.nn.functional.silu(linear("gate", x[t])) * linear("up", x[t])
        y[t] += weights[t, k] * linear("down", hidden)
    return y.numpy()


# %%
from jax_moe_lora import ExpertWeights, LoRAAdapter, LoRAWeights, MoEConfig, create_bank, insert, moe_lora
from jax_moe_lora.nn import moe_sites

config = MoEConfig(hidden_size=D, expert_width=F, num_experts=E, top_k=K)
layer = jax.jit(moe_lora, static_argnames=("config",))
banks = {dtype: create_bank(moe_sites(config), num_slots=4, max_rank=48, dtype=dtype) for dtype in TOLERANCE}


def weights_of(a, b):
    of_expert = np.broadcast_to((a != 0).any(2).sum(1), E).astype(np.int32)
    return LoRAWeights(a, b, of_expert, np.full(E, SCALE, np.float32))


def run(x, router, base, adapters, slots, dtype):
    bank = banks[dtype]
    for slot, own in enumerate(adapters):
        if own:
            bank = insert(bank, slot, LoRAAdapter("probe", {(0, m): weights_of(*sides) for m, sides in own.items()}))
    x, router = jnp.asarray(x, dtype), jnp.asarray(router, dtype)
    experts = ExpertWeights(**{module: jnp.asarray(w, dtype) for module, w in base.items()})
    return np.asarray(layer(x, router, experts, config, bank.layer(0), jnp.asarray(slots, jnp.int32)))


# %% [markdown]
# ## The table
#
# Largest absolute difference, relative Frobenius error and cosine, for each dtype.

# %%
from IPython.display import Markdown

from jax_moe_lora.inspect import difference


def rounded(tree, dtype):
    """Float32 values that the dtype holds; an aliased matrix stays one object, and is stored once."""
    seen = {}

    def values(array):
        return seen.setdefault(id(array), np.asarray(jnp.asarray(array, dtype).astype(jnp.float32)))

    return jax.tree.map(values, tree)


found = {}
for name, (adapters, turn) in PROBES.items():
    slots = np.resize(turn, T)
    for dtype in TOLERANCE:
        inputs = rounded((x, router, base, adapters), dtype)
        expected = reference(*jax.tree.map(torch.tensor, inputs), slots)
        found[name, dtype] = difference(run(*inputs, slots, dtype), expected)

head = "| probe |" + "".join(f" {dtype}: max abs | relative | cosine |" for dtype in TOLERANCE)
lines = [head, "|---" * (1 + 3 * len(TOLERANCE)) + "|"]
for name in PROBES:
    cells = [found[name, dtype] for dtype in TOLERANCE]
    lines.append(f"| {name} |" + "".join(f" {d.max_abs:.1e} | {d.relative:.1e} | {d.cosine:.7f} |" for d in cells))
within = [difference.relative <= TOLERANCE[dtype] for (_, dtype), difference in found.items()]
print(f"{sum(within)} of {len(within)} within the tolerance of their dtype")
Markdown("\n".join(lines))

# %%
from jax_moe_lora import plots

relative = {dtype: np.array([found[name, dtype].relative for name in PROBES]) for dtype in TOLERANCE}
axes = plots.parity(relative, list(PROBES), TOLERANCE)

# %% [markdown]
# ## What is exact
#
# Some results are equal bit for bit, in every dtype: no adapter and a zero adapter give the base layer; rows without an
# adapter have the bits of the layer that has no bank; a shared matrix has the bits of its copies.

# %%
slots, rest = np.resize([0, -1], T), np.full(T, -1)
copies = {m: tuple(np.broadcast_to(side, (E, *side.shape[1:])) for side in sides) for m, sides in outer.items()}
zero, _ = PROBES["zero"]
for dtype in TOLERANCE:
    without, zeros, mixed, copied = (
        run(x, router, base, adapters, at, dtype)
        for adapters, at in (([], rest), (zero, rest * 0), ([outer], slots), ([copies], slots))
    )
    print(
        f"{dtype:9} zero adapter: {difference(zeros, without).equal},"
        f" base rows: {difference(mixed[1::2], without[1::2]).equal},"
        f" shared = copies: {difference(copied, mixed).equal}"
    )
