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
# # Where tokens go, and how an adapter moves them
#
# You will see which experts the routers of a model choose: how evenly they are used, which are chosen together, and how
# much of that changes under a LoRA adapter, by layer, by expert and by position in the text.
#
# `router_trace` records what every router decides, as arrays: scores `[L, B, T, E]`, weights and expert ids
# `[L, B, T, K]`, for L layers, B requests, T tokens, E experts and K experts per token. All that follows is computed
# from these arrays.
#
# To run it: `pip install ".[notebooks]"` in a clone of the repository, which includes the model and its adapters. A CPU
# is enough; it takes about a minute.

# %%
import numpy as np

from jax_moe_lora import Model, plots
from jax_moe_lora.demo import TASKS, data_folder, heldout_strings, prompt
from jax_moe_lora.inspect import changed_experts, coactivation, divergence, entropy, expert_load, router_trace

plots.show_as_svg()
model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=4)
for folder in sorted((data_folder() / "adapters").iterdir()):
    info = model.load_adapter(folder, adapter_name=folder.name)
    print(f"{info.name:8} changes {', '.join(info.ranks)}")

# %% [markdown]
# ## One text, five routings
#
# Each adapter solves a task, such as `upper`: `hello>HELLO`. For each task, the same strings with their right answers
# are read twice in one batch: by the base model and by the adapter of that task. Only `reverse` changes the routers'
# own weights. The other adapters shift the routing by changing the activations that later routers read.

# %%
strings = heldout_strings(48)
names = list(model.adapters)
texts = [prompt(string) + TASKS[name](string) for name in names for string in strings]
encoded = [model.tokenizer.encode(text) for text in texts]
lengths = [len(ids) for ids in encoded]
tokens = [ids + [0] * (max(lengths) - len(ids)) for ids in encoded]

task_of_row = np.repeat(names, len(strings))
trace = router_trace(model, tokens * 2, [None] * len(tokens) + task_of_row.tolist(), lengths * 2)
base, adapted = np.split(trace.experts, 2, axis=1)
base_p, adapted_p = np.split(trace.probabilities, 2, axis=1)
real = trace.real[: len(tokens)]  # False on padding
tokens_of = {name: real & (task_of_row == name)[:, None] for name in names}  # [B, T]: the tokens of one task
E = trace.num_experts
print(f"scores {trace.scores.shape}, experts {trace.experts.shape}")

# %% [markdown]
# ## Load: how evenly the experts are used
#
# The share of a layer's routed pairs (a token and one of its experts) that each expert gets. In the first layer,
# experts 4 and 5 are almost idle on this text. In the last layer, `upper` moves load from expert 6 to experts 7 and 0.

# %%
loads = {"base": expert_load(base, E, real)}
loads |= {name: expert_load(adapted, E, tokens_of[name]) for name in names}
axes = plots.expert_load({name: loads[name] for name in ("base", "reverse", "upper")}, trace.layers)

# %% [markdown]
# ## Entropy: how even, and how undecided
#
# In bits; eight experts allow at most 3. On the left, the entropy of the load: high where a layer uses its experts
# evenly. On the right, the entropy of the router's probabilities, averaged over tokens: high where the router is
# undecided about a single token.

# %%
of_load = np.stack([entropy(load) for load in loads.values()])
of_token = np.stack(
    [entropy(base_p)[:, real].mean(1)] + [entropy(adapted_p)[:, tokens_of[name]].mean(1) for name in names]
)
axes = plots.heatmaps(
    {"of the load": of_load, "of the router, per token": of_token},
    list(loads),
    trace.layers,
    title=f"Entropy of the routing (at most {np.log2(E):.0f} bits)",
    label="bits",
    xlabel="layer",
    digits=2,
)

# %% [markdown]
# ## Experts chosen together
#
# The base model's tokens choose two experts each. Row i shows which expert comes along when expert i is chosen. In the
# first layer, experts 3 and 6 are always chosen together. The next cell shows for which tokens: it is the separator
# `>`, every time.

# %%
axes = plots.coactivation(coactivation(base, E, real), trace.layers)

# %%
pair = real & (np.sort(base[0], axis=-1) == [3, 6]).all(-1)
separator = np.asarray(tokens) == model.tokenizer.encode(prompt(""))[-1]
print(f"{pair.sum()} tokens choose experts 3 and 6; {(pair & separator).sum()} of them are separators")
print(f"{separator.sum()} separators in the text")

# %% [markdown]
# ## How much an adapter changes the routing
#
# The same tokens with and without the adapter. The first figure shows the share of expert choices that differ, the
# second how far the routers' probabilities move (Jensen-Shannon divergence: 0 if they are equal, 1 bit at most). The
# router of a layer reads what attention and the layers below have written, so an adapter on the experts only (`shift`,
# `upper`) cannot reach the first router.

# %%
changed = np.stack([changed_experts(adapted, base, tokens_of[name]) for name in names])
apart = divergence(adapted_p, base_p)
moved = np.stack([apart[:, tokens_of[name]].mean(1) for name in names])
axes = plots.heatmaps(
    {"": 100 * changed},
    names,
    trace.layers,
    title="Expert choices that differ",
    label="% of routed pairs",
    xlabel="layer",
    ylabel="adapter",
    digits=0,
)
axes = plots.heatmaps(
    {"": moved},
    names,
    trace.layers,
    title="Divergence of the routers",
    label="bits",
    xlabel="layer",
    ylabel="adapter",
    digits=3,
)

# %% [markdown]
# ## Which experts gain load
#
# The load of each expert in the last layer with the adapter, minus the load with the base model, on the tokens of the
# adapter's own task.

# %%
gain = np.stack(
    [expert_load(adapted, E, tokens_of[name])[-1] - expert_load(base, E, tokens_of[name])[-1] for name in names]
)
axes = plots.heatmaps(
    {"": 100 * gain},
    names,
    range(E),
    title=f"Expert load in layer {trace.layers[-1]}: adapter minus base model",
    label="percentage points",
    xlabel="expert",
    ylabel="adapter",
    diverging=True,
    digits=0,
)

# %% [markdown]
# ## Where in the text the choices change
#
# The share of the last layer's expert choices that differ, by position: the letters of the prompt, the separator, and
# the letters of the answer (marked with a prime). Both routings read the same text.

# %%
length = 6
rows = np.array([len(string) == length for string in strings * len(names)])
same = (adapted[-1][..., None] == base[-1][..., None, :]).any(-1).mean(-1)  # [B, T]
positions = [f"{i + 1}" for i in range(length)] + [">"] + [f"{i + 1}'" for i in range(length)]
axes = plots.lines(
    np.arange(len(positions)),
    {name: 100 * (1 - same[rows & (task_of_row == name)].mean(0)[: len(positions)]) for name in names},
    title=f"Expert choices that differ in layer {trace.layers[-1]} (strings of {length} letters)",
    xlabel="prompt, separator, answer",
    ylabel="% of routed pairs",
)
axes.set_ylim(0, 105)
_ = axes.set_xticks(range(len(positions)), positions)
