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
# `router_trace` keeps what every router decided: scores `[L, B, T, E]`, weights and expert ids `[L, B, T, K]`. All that
# follows is arrays made from these, and figures of the arrays.

# %%
import numpy as np

from jax_moe_lora import Model, plots
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.demo.tasks import TASKS, heldout_strings, prompt
from jax_moe_lora.inspect import changed_experts, coactivation, divergence, entropy, expert_load, router_trace

model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=4)
for folder in sorted((data_folder() / "adapters").iterdir()):
    info = model.load_adapter(folder, adapter_name=folder.name)
    print(f"{info.name:8} on {', '.join(info.ranks)}")

# %% [markdown]
# ## One text, five routings
#
# For each task the same strings and their right answers, `hello>HELLO`, read once by the base model and once by the
# adapter of that task, all in one batch. Of these adapters one has a matrix on the router itself; the others move the
# routing by what they do to the rows that the next router reads.

# %%
strings = heldout_strings(48)
names = list(model.adapters)
texts = [prompt(string) + TASKS[name](string) for name in names for string in strings]
encoded = [model.tokenizer.encode(text) for text in texts]
lengths = [len(ids) for ids in encoded]
tokens = [ids + [0] * (max(lengths) - len(ids)) for ids in encoded]

of_row = np.repeat(names, len(strings))
trace = router_trace(model, tokens * 2, [None] * len(tokens) + of_row.tolist(), lengths * 2)
base, adapted = np.split(trace.experts, 2, axis=1)
base_p, adapted_p = np.split(trace.probabilities, 2, axis=1)
real = trace.real[: len(tokens)]
of_task = {name: real & (of_row == name)[:, None] for name in names}  # [B, T]: the tokens of one task
E = trace.num_experts
print(f"scores {trace.scores.shape}, experts {trace.experts.shape}")

# %% [markdown]
# ## Load
#
# The part of a layer's routed pairs that each expert gets. In the first layer experts 4 and 5 are almost idle on this
# text; in the last one, `upper` takes the load away from expert 6 and gives it to 7 and 0.

# %%
loads = {"base": expert_load(base, E, real)}
loads |= {name: expert_load(adapted, E, of_task[name]) for name in names}
axes = plots.expert_load({name: loads[name] for name in ("base", "reverse", "upper")}, trace.layers)

# %% [markdown]
# ## Entropy
#
# In bits, of 3 at most with eight experts. Of the load: how evenly a layer uses its experts. Of the router's
# probabilities, averaged over tokens: how undecided it is about one token.

# %%
of_load = np.stack([entropy(load) for load in loads.values()])
of_token = np.stack(
    [entropy(base_p)[:, real].mean(1)] + [entropy(adapted_p)[:, of_task[name]].mean(1) for name in names]
)
axes = plots.heatmaps(
    {"of the load": of_load, "of a token's router": of_token},
    list(loads),
    trace.layers,
    title=f"Entropy of the routing (at most {np.log2(E):.0f} bits)",
    label="bits",
    xlabel="layer",
    digits=2,
)

# %% [markdown]
# ## Experts that are chosen together
#
# With two experts a token, a row of a panel says who the second one is. Experts 3 and 6 of the first layer are always
# chosen together. Which tokens are these?

# %%
axes = plots.coactivation(coactivation(base, E, real), trace.layers)

# %%
pair = real & (np.sort(base[0], axis=-1) == [3, 6]).all(-1)
separator = np.asarray(tokens) == model.tokenizer.encode(prompt(""))[-1]
print(f"{pair.sum()} tokens; the separator among them: {(pair & separator).sum()}, of {separator.sum()} in the text")

# %% [markdown]
# ## How an adapter shifts the routing
#
# The same tokens with and without the adapter: the part of the choices that are others, and the divergence of the
# routers' probabilities. A layer's router reads what attention and the layers below it wrote, so an
# adapter on the experts alone cannot reach the first router.

# %%
changed = np.stack([changed_experts(adapted, base, of_task[name]) for name in names])
apart = divergence(adapted_p, base_p)
moved = np.stack([apart[:, of_task[name]].mean(1) for name in names])
axes = plots.heatmaps(
    {"% of choices changed": 100 * changed},
    names,
    trace.layers,
    title="Choices that the adapter changes",
    label="% of routed pairs",
    xlabel="layer",
    digits=0,
)
axes = plots.heatmaps(
    {"": moved},
    names,
    trace.layers,
    title="Divergence from the base model's routing",
    label="Jensen-Shannon, bits",
    xlabel="layer",
    digits=3,
)

# %% [markdown]
# ## Which experts win
#
# The change of load under each adapter, on its own task's tokens, in the last layer.

# %%
last = np.stack(
    [expert_load(adapted, E, of_task[name])[-1] - expert_load(base, E, of_task[name])[-1] for name in names]
)
axes = plots.heatmaps(
    {"": 100 * last},
    names,
    range(E),
    title=f"Change of expert load in layer {trace.layers[-1]}, adapter minus base",
    label="percentage points",
    xlabel="expert",
    diverging=True,
    digits=0,
)

# %% [markdown]
# ## Where in the text
#
# The part of the last layer's choices that change, by position: the letters of the prompt, the separator, the letters
# of the answer. Both routings are of the same text.

# %%
length = 6
rows = np.array([len(string) == length for string in strings * len(names)])
kept = (adapted[-1][..., None] == base[-1][..., None, :]).any(-1).mean(-1)  # [B, T]
marks = [f"{i + 1}" for i in range(length)] + [">"] + [f"{i + 1}'" for i in range(length)]
axes = plots.lines(
    np.arange(len(marks)),
    {name: 100 * (1 - kept[rows & (of_row == name)].mean(0)[: len(marks)]) for name in names},
    title=f"Choices that change in layer {trace.layers[-1]}, by position ({length} letters)",
    xlabel="prompt, separator, answer",
    ylabel="% of routed pairs",
)
_ = axes.set_xticks(range(len(marks)), marks)
