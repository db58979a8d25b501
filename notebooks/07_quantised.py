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
# # Quantised experts under LoRA adapters
#
# You will quantise the demo model to fp8, mxfp4 and int4, read a quantised checkpoint as it is published, and see what
# each format saves and what it costs: memory, the error of each layer, and how far the predictions move. Then one batch
# mixes base rows and adapters over 4-bit weights, an adapter is merged into them, and a layer is timed.
#
# Weights are kept in 8 or 4 bits; adapters and activations stay as they are. A weight is dequantised a tile at a time
# when it is multiplied.
#
# To run it: `pip install ".[notebooks]"` in a clone of the repository, which includes the model and its adapters. A CPU
# is enough; it takes about a minute.

# %%
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jax_moe_lora import CheckpointError, ExpertWeights, Model, merge_adapter, plots, quantise_checkpoint, read_adapter
from jax_moe_lora.demo import TASKS, data_folder, heldout_strings, prompt
from jax_moe_lora.inspect import inspect_model
from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.ops import Quantised, dequantise, quantise

plots.show_as_svg()
FORMATS = ["fp8", "mxfp4", "int4"]
folder = Path(tempfile.mkdtemp())


def relative(found, expected):
    return float(jnp.linalg.norm(jnp.ravel(found - expected)) / jnp.linalg.norm(jnp.ravel(expected)))


# %% [markdown]
# ## The formats that are read
#
# Each format of published checkpoints, and the error of a matrix of normal numbers in it, beside bfloat16. A scale is
# shared by a block of rows and columns (0 means all of them); its bits are counted too. Four bits have 16 numbers: the
# fewer values share a scale, the nearer is the next one.

# %%
wide = jnp.asarray(np.random.default_rng(0).standard_normal((256, 1024)), jnp.float32)
rounded = wide.astype(jnp.bfloat16).astype(jnp.float32)
print(f"{'bfloat16':12} 16.00 bits per weight{'':25} error {relative(rounded, wide):.2%}")
for name in ["fp8_block", "fp8_channel", "fp8_tensor", "mxfp4", "nvfp4", "int4", "int4_zero"]:
    few = quantise(wide, name, scales_dtype=jnp.bfloat16)
    size, error = 8 * few.nbytes / wide.size, relative(dequantise(few, "float32"), wide)
    print(f"{name:12} {size:5.2f} bits per weight, a scale per {few.format.block!s:10}: error {error:.2%}")

# %% [markdown]
# ## Experts that the formats fit
#
# mxfp4 and int4 share a scale among 32 columns. Experts of published models are a multiple of 128 wide; those of the
# demo model are 48 wide. So first a copy with experts of width 64: the new rows of gate and up and the new columns of
# down are zero, which changes no output. The adapters get the same zeros.

# %%
WIDTH = 64


def widened(array, axis):
    """The array with zeros behind it, up to the new width."""
    return np.pad(array, [(0, WIDTH - size if at == axis % array.ndim else 0) for at, size in enumerate(array.shape)])


shutil.copytree(data_folder() / "model", folder / "float32")
config = json.loads((folder / "float32" / "config.json").read_text())
(folder / "float32" / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": WIDTH}))
for shard in (folder / "float32").glob("*.safetensors"):
    tensors = load_file(shard)
    for name in (name for name in tensors if ".experts." in name):
        tensors[name] = widened(tensors[name], -1 if "down_proj" in name else 0)
    save_file(tensors, shard)

adapters = {}
for name in ("upper", "reverse", "sort"):
    adapter = read_adapter(data_folder() / "adapters" / name, data_folder() / "model")
    weights = dict(adapter.weights)
    for (layer, module), one in adapter.weights.items():
        if module == "down":
            weights[layer, module] = replace(one, a=widened(one.a, -1))
        elif module in ("gate", "up"):
            weights[layer, module] = replace(one, b=widened(one.b, 1))
    adapters[name] = replace(adapter, weights=weights)

# %% [markdown]
# ## Quantise
#
# `quantise=` quantises a 16-bit or float32 checkpoint while it is read. Each matrix becomes a `Quantised`: its values,
# their scales, and the format, which says how many values share a scale.

# %%
models = {"float32": Model.from_pretrained(folder / "float32", dtype="float32", max_adapters=3)}
for scheme in FORMATS:
    models[scheme] = Model.from_pretrained(folder / "float32", dtype="float32", max_adapters=3, quantise=scheme)
for scheme in FORMATS:
    gate = models[scheme].params.layers[0]["gate"]
    values, scales = gate.values, gate.scales
    print(f"{scheme:6} gate {gate.shape}: {values.dtype} {values.shape}, {scales.dtype} scales {scales.shape}")

# %% [markdown]
# ## A quantised checkpoint, as it is published
#
# `jax-moe-lora quantise MODEL OUT --format int4` (here `quantise_checkpoint`) writes the same numbers as a checkpoint
# in a published form, for int4 that of compressed-tensors. Its config says how it is quantised, and each matrix has
# several tensors.

# %%
quantise_checkpoint(folder / "float32", folder / "int4", format="int4")
settings = json.loads((folder / "int4" / "config.json").read_text())["quantization_config"]
weights = settings["config_groups"]["group_0"]["weights"]
print(settings["quant_method"], settings["format"], {key: weights[key] for key in ("type", "num_bits", "group_size")})
for shard in (folder / "int4").glob("*.safetensors"):
    for name, array in load_file(shard).items():
        if ".0.mlp.experts.0.gate_proj" in name:
            print(f"{name}: {array.dtype} {array.shape}")
for row in inspect_model(folder / "int4").formats:
    print(f"{row.matrices} matrices in {row.name}, {row.parameters} weights in {row.nbytes} bytes")

# %% [markdown]
# It loads as it is, like one from the hub, and holds bit for bit what `quantise="int4"` makes.

# %%
published = Model.from_pretrained(folder / "int4", dtype="float32", max_adapters=3)
pairs = zip(jax.tree.leaves(published.params), jax.tree.leaves(models["int4"].params), strict=True)
print(f"equal bit for bit: {all(bool((one == other).all()) for one, other in pairs)}")

# %% [markdown]
# ## Memory
#
# Of the matrices that are quantised: experts, attention. Embedding, head, norms and routers stay as they are. int4
# keeps its scales in the checkpoint's dtype, here float32; beside bfloat16 weights it has 4.5 bits per weight.


# %%
def quantised_matrices(scheme):
    """path -> matrix, of those that the format has in few bits."""
    leaves = jax.tree_util.tree_flatten_with_path(models[scheme].params, is_leaf=lambda x: isinstance(x, Quantised))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


chosen = [path for path, leaf in quantised_matrices("fp8").items() if isinstance(leaf, Quantised)]
bits = {}
for scheme in models:
    matrices = quantised_matrices(scheme)
    bits[scheme] = (
        8 * sum(matrices[path].nbytes for path in chosen) / sum(np.prod(matrices[path].shape) for path in chosen)
    )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(models[scheme].params))
    print(f"{scheme:8} {bits[scheme]:5.2f} bits per weight; the whole model {total / 2**20:.2f} MiB")

figure, axes = plots.pyplot().subplots(figsize=(5, 2.4), layout="constrained")
axes.barh(list(bits), list(bits.values()), color="0.45")
axes.invert_yaxis()
_ = axes.set(xlabel="bits per weight, scales included", title="Memory of the quantised matrices")

# %% [markdown]
# ## The error of each matrix
#
# The relative error of the numbers that a format holds, by module and layer. fp8 has three bits after the leading one,
# so its error hardly depends on how values are distributed. Four-bit formats have a few values for each group, so
# their error does.

# %%
modules = ["q", "k", "v", "o", "gate", "up", "down"]
exact = models["float32"].params.layers

errors = {
    scheme: np.array(
        [
            [100 * relative(dequantise(layer[module], "float32"), full[module]) for module in modules]
            for layer, full in zip(models[scheme].params.layers, exact, strict=True)
        ]
    )
    for scheme in FORMATS
}
axes = plots.heatmaps(
    errors,
    range(len(exact)),
    modules,
    title="Relative error of each matrix",
    label="%",
    ylabel="layer",
    digits=1,
)

# %% [markdown]
# ## The error of each routed layer
#
# The same rows go through the experts of a layer, in float32 and quantised. Three matrices follow one another, so the
# error of the output is larger than that of one matrix.

# %%
moe = models["float32"].config.moe
rng = np.random.default_rng(0)
rows = jnp.asarray(rng.standard_normal((64, moe.hidden_size)), jnp.float32)
experts = jnp.asarray([rng.permutation(moe.num_experts)[: moe.top_k] for _ in rows], jnp.int32)
shares = jnp.full(experts.shape, 1 / moe.top_k, jnp.float32)
routed = jax.jit(lambda weights: routed_experts(rows, shares, experts, weights, moe))
outputs = {
    scheme: [routed(ExpertWeights(*(layer[name] for name in ("gate", "up", "down")))) for layer in model.params.layers]
    for scheme, model in models.items()
}
axes = plots.heatmaps(
    {
        "": np.array(
            [
                [100 * relative(*pair) for pair in zip(outputs[scheme], outputs["float32"], strict=True)]
                for scheme in FORMATS
            ]
        )
    },
    FORMATS,
    range(len(exact)),
    title="Relative error of a routed layer's output",
    label="%",
    xlabel="layer",
    digits=1,
)

# %% [markdown]
# The layer over quantised weights has exactly the output of the layer over the numbers that they hold: quantisation
# changes weights, and nothing else.

# %%
layer = models["mxfp4"].params.layers[0]
numbers = ExpertWeights(*(dequantise(layer[name], "float32") for name in ("gate", "up", "down")))
print(f"equal bit for bit: {bool((routed(numbers) == outputs['mxfp4'][0]).all())}")

# %% [markdown]
# ## How far predictions move
#
# The base model and three adapters read held-out strings of their task with the right answers, in one batch. For each
# token of an answer, the divergence of the next-token distribution from that of float32 weights (KL, in nats), and the
# share of tokens whose most likely successor stays the same. The base model, which knows no task, is asked nothing: it
# reads the strings of `upper`.

# %%
strings = heldout_strings(24)
readers = [None, *adapters]
texts = [prompt(text) + TASKS[name or "upper"](text) for name in readers for text in strings]
of_row = [name for name in readers for _ in strings]
encoded = [models["float32"].tokenizer.encode(text) for text in texts]
lengths = [len(ids) for ids in encoded]
tokens = np.array([ids + [0] * (max(lengths) - len(ids)) for ids in encoded])
starts = np.array([len(prompt(text)) - 1 for _ in readers for text in strings])  # at the separator
answer = (np.arange(tokens.shape[1]) >= starts[:, None]) & (np.arange(tokens.shape[1]) < np.array(lengths)[:, None])


def log_probabilities(model):
    logits = np.asarray(model.logits(tokens, of_row, lengths=lengths), np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


for model in models.values():
    for name, adapter in adapters.items():
        model.load_adapter(adapter, adapter_name=name)
predicted = {scheme: log_probabilities(model) for scheme, model in models.items()}
names = [name or "base" for name in readers]
kl = {}
for scheme in FORMATS:
    before, after = predicted["float32"], predicted[scheme]
    apart = (np.exp(before) * (before - after)).sum(-1)
    same = before.argmax(-1) == after.argmax(-1)
    groups = [answer & np.array([row == name for row in of_row])[:, None] for name in readers]
    kl[scheme] = np.array([apart[group].mean() for group in groups])
    kept = ", ".join(f"{name} {same[group].mean():.1%}" for name, group in zip(names, groups, strict=True))
    print(f"{scheme:6} most likely token kept: {kept}")
axes = plots.lines(
    np.arange(len(names)),
    kl,
    title="Divergence from float32 weights, per token of an answer",
    xlabel="reader",
    ylabel="KL, nats",
    logy=True,
)
_ = axes.set_xticks(range(len(names)), names)

# %% [markdown]
# ## One batch: base rows and adapters over four bits
#
# The adapters were trained over float32 weights, and are served over quantised ones as they are.

# %%
answers = models["int4"].generate(["quantised>"] * len(readers), readers, max_new_tokens=12)
for name, one in zip(readers, answers, strict=True):
    right = "" if name is None else f", right is {TASKS[name]('quantised')}"
    print(f"{name or 'base':8} {one.text}{right}")

# %% [markdown]
# A base row has the same bits whatever the other rows use, over quantised weights too. Here the same batch runs without
# any adapter, and then with adapters in three quarters of its rows.

# %%
mixed = np.asarray(models["int4"].logits(tokens, of_row, lengths=lengths))
alone = np.asarray(models["int4"].logits(tokens, [None] * len(tokens), lengths=lengths))
base = np.array([name is None for name in of_row])
print(f"base rows equal bit for bit: {(mixed[base] == alone[base]).all()}")
print(f"rows with an adapter equal: {(mixed[~base] == alone[~base]).any(axis=(1, 2)).all()}")

# %% [markdown]
# ## Merging
#
# The sum of a quantised weight and an update is not one of the format's numbers. So merging into a quantised checkpoint
# is refused, and the sentence says the ways out.

# %%
try:
    merge_adapter(adapters["upper"], folder / "int4", folder / "merged")
except CheckpointError as error:
    print(str(error).replace(f"{folder}/", ""))

# %% [markdown]
# With `requantise=True` (`--requantise`), the sums are rounded again, and what that does is reported: the error of the
# rounding relative to the update, and the share of the update that is kept. Four bits are coarse beside the updates
# of an adapter; one that is served over the quantised weights loses nothing.

# %%
for row in merge_adapter(adapters["upper"], folder / "int4", folder / "merged", requantise=True):
    error = f"error {row.error:.1%} of the weights, {row.of_update:.0%} of the update"
    print(f"{row.module:4} {row.matrices:2} matrices: {error}; {row.kept:.0%} of the update kept")

# %% [markdown]
# ## Timing a layer
#
# `jax-moe-lora bench --shape qwen3-30b-a3b --quantise fp8 --quantise mxfp4` times a layer over the same weights in 16
# bits and in each format, beside a floor that counts the bytes of values and scales. The time of this small layer on a
# CPU says nothing about a GPU, so it is not printed: the error is, of the timed layer against one in float32 over the
# numbers that its weights hold, and the bytes that it reads. `bench-model --quantise` does the same for a whole model.

# %%
from jax_moe_lora.benchmark.problem import make_problem
from jax_moe_lora.benchmark.quantised import quantised
from jax_moe_lora.benchmark.sweep import Cells, ThisLibrary, sweep
from pallas_kernels.specs import ADAPTERS

cells = Cells(["small"], ["none"], [8], "uniform", "uniform")
drawn = make_problem("small").with_tokens(8, "uniform", ADAPTERS["none"])
for row in sweep(cells, [ThisLibrary(), ThisLibrary(scheme="mxfp4")], repeats=2, method="queue"):
    scheme = row["engine"].partition("/")[2]
    given = replace(drawn, experts=quantised(drawn.experts, scheme)) if scheme else drawn
    print(f"{row['engine']:19} relative error {row['rel_err']:.1e}, {given.moved_bytes() / 2**10:.0f} KiB read")
shutil.rmtree(folder)
