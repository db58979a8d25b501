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
# # How fast, beside what the device allows
#
# One routed layer of Qwen3-30B-A3B (128 experts, 8 a token) in bfloat16, over tokens, number of adapters and rank. The
# *floor* is what the card was measured to do: the weights and pages that are hit, read once, or the multiplications,
# whichever takes longer. On a GPU the next cell measures; elsewhere it reads what was measured on an H200.

# %%
import json
from pathlib import Path

import jax
import numpy as np

import pallas_kernels
from jax_moe_lora import plots
from jax_moe_lora.benchmark.report import about
from jax_moe_lora.benchmark.sweep import Cells, Ours, sweep
from pallas_kernels.specs import ADAPTERS

results = Path(pallas_kernels.__file__).parent / "results"
if jax.default_backend() == "gpu":
    cells = Cells(["qwen3-30b-a3b"], ["none", "s8r16", "s8r64", "s32r16"], [8, 128, 2048])
    measured = about([]) | {"rows": list(sweep(cells, [Ours(), Ours("xla")], method="queue"))}
else:
    measured = json.loads((results / "h200.json").read_text())
uniform = {"routing": "uniform", "slots": "uniform"}  # the files hold other distributions too
rows = [row for row in measured["rows"] if "error" not in row and uniform.items() <= row.items()]
print(measured["device"], measured["date"], *measured["ceilings"].items())
for name in dict.fromkeys(row["adapters"] for row in rows):
    print(f"{name:8} {ADAPTERS[name].slots} adapters, ranks {ADAPTERS[name].ranks}")

# %% [markdown]
# ## Latency over tokens
#
# Up to some hundred tokens a layer is read from memory: each token meets more experts, each expert is read once. From a
# few thousand on it computes.

# %%
from jax_moe_lora.benchmark.plots import roofline

figure = roofline(rows, f"Time of one routed layer, {measured['device']}, {measured['date']}")

# %% [markdown]
# ## What adapters cost
#
# Time with adapters over time without, by tokens. Dotted: the same ratio of the floors, which is what the adapters'
# pages and products have to cost. `s8r64` and `s32r16` hold equally many ranks: 8 adapters of 64, 32 of 16.


# %%
shape = rows[0]["shape"]
rows = [row for row in rows if row["shape"] == shape]  # one shape from here on


def column(key, **cell):
    """tokens -> figure, of the rows of one engine and adapter set."""
    return {row["tokens"]: row[key] for row in rows if all(row[name] == value for name, value in cell.items())}


def over(key, name, tokens):
    """`[tokens]`: with adapters over without; NaN where it was not measured."""
    of, base = (column(key, engine="jax_moe_lora", adapters=adapters) for adapters in (name, "none"))
    return np.array([of.get(count, np.nan) / base[count] for count in tokens])


tokens = sorted(column("layer_us", engine="jax_moe_lora", adapters="none"))
names = [name for name in dict.fromkeys(row["adapters"] for row in rows) if name != "none"]
axes = plots.lines(
    tokens,
    {name: over("layer_us", name, tokens) for name in names},
    floor={name: over("floor_us", name, tokens) for name in names},
    title=f"Time of a layer with adapters, over the same layer without ({shape})",
    xlabel="tokens in the batch",
    ylabel="ratio",
    logx=True,
)

# %% [markdown]
# ## How much of the floor's speed is reached

# %%
part = np.full((1 + len(names), len(tokens)), np.nan)
for row in rows:
    if row["engine"] == "jax_moe_lora":
        part[["none", *names].index(row["adapters"]), tokens.index(row["tokens"])] = row["floor_us"] / row["layer_us"]
axes = plots.heatmaps(
    {"": 100 * part},
    ["none", *names],
    tokens,
    title=f"Speed of a layer, of what the floor allows ({shape})",
    label="% of the floor's speed",
    xlabel="tokens in the batch",
    ylabel="adapters",
    digits=0,
)

# %% [markdown]
# ## Beside XLA
#
# One grouped matmul of the layer (its gate projection) on the H200 through XLA: `jax.lax.ragged_dot`, and the loop over
# tiles that this library runs where it has no kernel. Beside them a third of the whole Hopper layer, which has three
# such projections and also sorts, activates and combines.

# %%
xla = json.loads((results / "grouped_matmul_xla_h200.json").read_text())["rows"]
h200 = json.loads((results / "h200.json").read_text())
counts = sorted({row["tokens"] for row in xla})
time = {(row["expression"], row["tokens"]): row["us"] for row in xla}
plain = uniform | {"shape": "qwen3-30b-a3b", "adapters": "none"}
layer = {row["tokens"]: row for row in h200["rows"] if plain.items() <= row.items()}
third = {key: np.array([layer[count][key] / 3 for count in counts]) for key in ("layer_us", "floor_us")}
axes = plots.lines(
    counts,
    {
        "jax.lax.ragged_dot": [time["ragged_dot", count] for count in counts],
        "XLA, loop over tiles": [time["tile_loop", count] for count in counts],
        "Hopper layer / 3": third["layer_us"],
    },
    floor={"Hopper layer / 3": third["floor_us"]},
    title="One grouped matmul, 128 experts, bfloat16, H200",
    xlabel="tokens in the batch",
    ylabel="µs",
    logx=True,
    logy=True,
)

# %% [markdown]
# ## The whole model
#
# Decode steps of all 48 layers with eight adapters of rank 16 on the experts, 512 tokens in the cache.

# %%
model = json.loads((results / "h200_model.json").read_text())
steps = [row for row in model["rows"] if (row["kind"], row["adapters"]) == ("decode", "s8r16")]
axes = plots.lines(
    [row["batch"] for row in steps],
    {"decode step": [row["ms"] for row in steps]},
    floor={"decode step": [row["floor_ms"] for row in steps]},
    title=f"Qwen3-30B-A3B, one token of each request, {model['device']}",
    xlabel="requests in the batch",
    ylabel="ms",
    logx=True,
)
axes.set_ylim(bottom=0)
for row in steps:
    print(f"batch {row['batch']:3}: {row['ms']:5.1f} ms, {row['tokens_per_s']:6.0f} tokens/s")

# %% [markdown]
# ## Here and now
#
# A small layer (16 experts, 4 a token, 128 tokens, float32) through XLA on this machine's processor: with one and with
# eight adapters of rank 16, and through `jax.lax.ragged_dot` without any. Only ratios, of the fastest of 20 runs: a
# shared processor's microseconds mean little, and these move from run to run.

# %%
from jax_moe_lora.benchmark.layer import compile_layer, own_layer
from jax_moe_lora.benchmark.peers import PEERS
from jax_moe_lora.benchmark.problem import make_problem

small = make_problem("small", dtype="float32")
fastest = {}
for name in ("none", "s1r16", "s8r16"):
    problem = small.with_adapters(name).with_tokens(128, "uniform", ADAPTERS[name])
    fastest[name] = compile_layer(problem, own_layer(problem, "xla"), "queue")(20)["min_us"]
problem = small.with_tokens(128, "uniform", ADAPTERS["none"])
fastest["ragged_dot"] = PEERS["ragged_dot"].prepare(problem, "queue")(20)["min_us"]
for name, us in fastest.items():
    print(f"{name:10} {us / fastest['none']:.1f} times the layer without adapters")
