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
# # Speed of a Qwen3-30B-A3B layer on an H200
#
# You will see how long one routed layer of Qwen3-30B-A3B takes on an NVIDIA H200, with and without LoRA adapters:
# beside what the device allows, beside other implementations, and in a decode step of the whole model, all in bfloat16.
#
# Nothing is measured here: every number is read from the results that ship with the package. To measure a GPU of your
# own, run `jax-moe-lora bench --out mine` and read `mine.json` instead of `h200.json`.
#
# To run it: `pip install ".[notebooks]"` in a clone of the repository. It takes seconds, on any machine.

# %%
import json
from pathlib import Path

import numpy as np

import pallas_kernels
from jax_moe_lora import plots
from pallas_kernels.specs import ADAPTERS, LAYERS

plots.show_as_svg()
MODEL = "qwen3-30b-a3b"
results = Path(pallas_kernels.__file__).parent / "results"
measured = json.loads((results / "h200.json").read_text())
uniform = {"routing": "uniform", "slots": "uniform"}  # the file has other distributions too
all_rows = [row for row in measured["rows"] if uniform.items() <= row.items()]
rows = [row for row in all_rows if row["shape"] == MODEL]
layer = LAYERS[MODEL]
print(f"{layer.num_experts} experts, {layer.top_k} per token")
print(f"model width {layer.hidden_size}, expert width {layer.expert_width}")
print(f"{measured['device']}, measured on {measured['date']} with jax {measured['versions']['jax']}")
for name, adapters in ADAPTERS.items():
    print(f"{name:7} adapters: {adapters.slots:2}, ranks: {', '.join(map(str, adapters.ranks)) or 'none'}")

# %% [markdown]
# The last lines are the sets of adapters that were timed. Each token draws its experts and its adapter uniformly at
# random; in `mixed`, half of the tokens have no adapter.
#
# ## The floor
#
# The *floor* is the least time that the device allows: reading the weights of the experts and adapters in use once, or
# doing the multiplications, whichever takes longer. Both limits were measured: the bandwidth of a large copy, and the
# speed of a large matrix multiplication. A layer that mostly reads can be slightly faster than its floor, because a
# copy, which also writes, does not reach the bandwidth of reading alone.

# %%
ceilings = measured["ceilings"]
print(f"copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, multiplication {ceilings['flop_per_s'] / 1e12:.0f} TFLOP/s")

# %% [markdown]
# ## Time over tokens
#
# With few tokens, the layer is bound by reading weights: each new token hits further experts, until all are read. From
# then on more tokens cost little, until the multiplications take longer than the reading. The lower panel shows how
# near each measurement is to its floor: 1 is the floor's speed.

# %%
from jax_moe_lora.benchmark.roofline import roofline

shown = ["none", "s8r16", "s8r64", "s32r16"]
figure = roofline(
    sorted((row for row in rows if row["adapters"] in shown), key=lambda row: shown.index(row["adapters"])),
    f"Time of one routed layer, {measured['device']}, {measured['date']}",
)

# %% [markdown]
# ## The cost of adapters
#
# The time with adapters, divided by the time of the same layer without any. The dotted lines show the same ratio of
# the floors: what reading and multiplying the adapters' matrices must cost. `s8r64` and `s32r16` have equally many
# ranks in total, in 8 adapters or in 32.


# %%
def by_tokens(key, adapters):
    """tokens -> value of the rows with this set of adapters."""
    return {row["tokens"]: row[key] for row in rows if row["adapters"] == adapters}


def ratio(key, adapters):
    """`[tokens]`: with these adapters over without any."""
    return np.array([by_tokens(key, adapters)[count] / by_tokens(key, "none")[count] for count in tokens])


tokens = sorted(by_tokens("layer_us", "none"))
sets = [name for name in ADAPTERS if name != "none"]
axes = plots.lines(
    tokens,
    {"none": np.ones(len(tokens))} | {name: ratio("layer_us", name) for name in sets},
    floor={name: ratio("floor_us", name) for name in sets},
    title="Time with adapters over time without, Qwen3-30B-A3B",
    xlabel="tokens in the batch",
    ylabel="ratio",
    logx=True,
)
for name in sets:
    times = dict(zip(tokens, ratio("layer_us", name), strict=True))
    most = max(times, key=times.get)
    print(f"{name:7} largest ratio: {times[most]:.2f}, at T = {most}")

# %% [markdown]
# ## How much of the floor's speed is reached
#
# The floor over the measured time, in per cent, for every set of adapters.


# %%
def reached(rows, names, key):
    """`[names, tokens]`: per cent of the floor's speed, of the rows whose `key` is each name."""
    percent = np.full((len(names), len(tokens)), np.nan)
    for row in rows:
        percent[names.index(row[key]), tokens.index(row["tokens"])] = 100 * row["floor_us"] / row["layer_us"]
    return percent


axes = plots.heatmaps(
    {"": reached(rows, list(ADAPTERS), "adapters")},
    list(ADAPTERS),
    tokens,
    title="Share of the floor's speed, Qwen3-30B-A3B",
    label="% of the floor's speed",
    xlabel="tokens in the batch",
    ylabel="adapters",
    digits=0,
)

# %% [markdown]
# ## Other models' layers
#
# The same for the layers of OLMoE, Mixtral-8x7B and a model with the sizes of gpt-oss-20b: without adapters, and with
# eight adapters of rank 16.

# %%
shapes = list(dict.fromkeys([MODEL, *(row["shape"] for row in all_rows)]))
axes = plots.heatmaps(
    {
        title: reached([row for row in all_rows if row["adapters"] == adapters], shapes, "shape")
        for title, adapters in (("none: without adapters", "none"), ("s8r16: 8 adapters of rank 16", "s8r16"))
    },
    shapes,
    tokens,
    title="Share of the floor's speed, by model",
    label="% of the floor's speed",
    xlabel="tokens in the batch",
    digits=0,
)

# %% [markdown]
# ## Beside other implementations
#
# The Qwen3-30B-A3B layer without adapters, written with `jax.lax.ragged_dot`, with torch's `grouped_mm` and by
# transformers, which also uses `grouped_mm`. All were timed in one run. With an adapter, the only other implementation
# is PEFT on transformers, which takes one adapter per batch; its times are printed below the figure.

# %%
peers = json.loads((results / "h200_peers.json").read_text())
peer_us = {(row["engine"], row["adapters"], row["tokens"]): row["layer_us"] for row in peers["rows"]}
peer_tokens = sorted({row["tokens"] for row in peers["rows"]})
engines = list(dict.fromkeys(row["engine"] for row in peers["rows"]))
floors = {row["tokens"]: row["floor_us"] for row in peers["rows"] if row["adapters"] == "none"}
axes = plots.lines(
    peer_tokens,
    {engine: [peer_us[engine, "none", count] for count in peer_tokens] for engine in engines},
    floor={"jax_moe_lora": [floors[count] for count in peer_tokens]},
    title=f"One Qwen3-30B-A3B layer without adapters, {peers['device']}, {peers['date']}",
    xlabel="tokens in the batch",
    ylabel="µs per layer",
    logx=True,
    logy=True,
)
for count in peer_tokens:
    here, peft = (peer_us[engine, "s1r16", count] for engine in ("jax_moe_lora", "transformers-grouped_mm"))
    print(f"one adapter of rank 16, {count:3} tokens: {here:.0f} µs here, {peft:.0f} µs by transformers and PEFT")

# %% [markdown]
# ## Without a kernel: XLA
#
# Where the library has no kernel for a device, it runs the grouped matrix multiplication through XLA as a loop over
# the tiles in use. The figure compares this loop with `jax.lax.ragged_dot`, for one such multiplication: the gate
# projection of a Qwen3-30B-A3B layer.

# %%
xla = json.loads((results / "grouped_matmul_xla_h200.json").read_text())
xla_us = {(row["expression"], row["tokens"]): row["us"] for row in xla["rows"]}
xla_tokens = sorted({row["tokens"] for row in xla["rows"]})
axes = plots.lines(
    xla_tokens,
    {
        "jax.lax.ragged_dot": [xla_us["ragged_dot", count] for count in xla_tokens],
        "jax_moe_lora[xla]": [xla_us["tile_loop", count] for count in xla_tokens],
    },
    title=f"One grouped matrix multiplication through XLA, {xla['device']}, {xla['date']}",
    xlabel="tokens in the batch",
    ylabel="µs",
    logx=True,
    logy=True,
)

# %% [markdown]
# ## The whole model
#
# A decode step produces one token for each request. With `s8r16`, one request in nine has no adapter. The floor of a
# step is what it must read (weights and adapters in use, cached keys and values) or multiply, whichever takes longer.

# %%
model = json.loads((results / "h200_model.json").read_text())
steps = {(row["adapters"], row["batch"]): row for row in model["rows"] if row["kind"] == "decode"}
batches = sorted({batch for _, batch in steps})
layers, context = steps["none", batches[0]]["layers"], steps["none", batches[0]]["length"]
axes = plots.lines(
    batches,
    {name: [steps[name, batch]["ms"] for batch in batches] for name in ("none", "s8r16")},
    floor={name: [steps[name, batch]["floor_ms"] for batch in batches] for name in ("none", "s8r16")},
    title=f"Decode step of Qwen3-30B-A3B, {layers} layers, {context} tokens of context, {model['device']}",
    xlabel="requests in the batch",
    ylabel="ms per step",
    logx=True,
)
axes.set_ylim(bottom=0)
for (name, batch), row in steps.items():
    print(f"{name:5} batch {batch:3}: {row['ms']:4.1f} ms, {row['tokens_per_s']:5.0f} tokens/s")
