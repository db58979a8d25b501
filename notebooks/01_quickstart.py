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
# # Many LoRA adapters in one batch
#
# You will see five requests answered in one batch: one by the base model and four by different LoRA adapters. You will
# also see that sharing a batch changes no bit of a result, and that loading and unloading adapters compiles nothing.
#
# The model is a small Qwen3-MoE that ships with the package. Its base model copies its input; each adapter, trained
# with transformers and PEFT, does something else with it.
#
# To run it: `pip install ".[notebooks]"` in a clone of the repository. A CPU is enough; it takes about a minute.

# %%
from jax_moe_lora import Model, count_compilations, plots
from jax_moe_lora.demo import TASKS, data_folder, heldout_strings, prompt

plots.show_as_svg()
model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=8)
for folder in sorted((data_folder() / "adapters").iterdir()):
    info = model.load_adapter(folder, adapter_name=folder.name)
    ranks = ", ".join(f"{module} {max(of_module)}" for module, of_module in info.ranks.items())
    print(f"{info.name:8} slot {info.slot}, {info.nbytes / 1024:4.0f} KiB, ranks: {ranks}")

# %% [markdown]
# ## One batch, five answers
#
# The adapters differ in rank, in the modules they change (the experts only, or attention and the router too) and in
# how their files store the experts (one tensor for all of them, or one per expert). They still share a batch. Each
# request names its adapter; `None` is the base model.

# %%
names = [None, *model.adapters]
text = heldout_strings(1)[0]
answers = model.generate([prompt(text)] * len(names), names, max_new_tokens=10)
for answer in answers:
    print(f"{answer.adapter_name or 'base':8} {prompt(text)} {answer.text}")

# %% [markdown]
# ## A mixed batch equals a solo batch, bit for bit
#
# The result of a row does not depend on the adapters of the other rows. Here each row's logits are compared with those
# of a solo run: the same program and the same prompts, with every other row on the base model.

# %%
import numpy as np

tokens = np.asarray([model.tokenizer.encode(prompt(text))] * len(names))
mixed = model.logits(tokens, names)
for row, name in enumerate(names):
    solo = model.logits(tokens, [name if index == row else None for index in range(len(names))])
    print(f"{name or 'base':8} same bits: {bool((mixed[row] == solo[row]).all())}")

# %% [markdown]
# ## What each adapter changes
#
# The logits of the next letter, minus those of the base model: orange letters became more likely, purple ones less.
# The base model copies the prompt's first letter. An adapter whose answer starts with another letter raises that one
# and lowers the letter that would be copied.

# %%
letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
columns = [model.tokenizer.encode(letter)[-1] for letter in letters]
last = np.asarray(mixed[:, -1])
change = (last - last[0])[1:, columns]
axes = plots.heatmaps(
    {"": change},
    names[1:],
    letters,
    title=f"Logits of the letter after “{prompt(text)}”: adapter minus base model",
    label="change of the logit",
    xlabel="next letter",
    ylabel="adapter",
    diverging=True,
)

# %% [markdown]
# ## Adapters come and go without recompiling
#
# One adapter is unloaded and the same files are loaded again under another name. The next batch mixes the adapters
# differently. Nothing is compiled.

# %%
with count_compilations() as count:
    model.unload_adapter("upper")
    model.load_adapter(data_folder() / "adapters" / "upper", "shout")
    mix = ["shout", "reverse", "sort", None, "sort"]
    answers = model.generate([prompt(text)] * len(mix), mix, max_new_tokens=10)
for answer in answers:
    print(f"{answer.adapter_name or 'base':8} {prompt(text)} {answer.text}")
print(f"compilations: {count.compilations}")

# %% [markdown]
# ## Right answers on unseen strings
#
# Exact matches on 24 strings that neither the base model nor an adapter was trained on, all in one batch.

# %%
strings = heldout_strings(24)
adapters = [None, *model.adapters]
requests = [(string, name) for string in strings for name in adapters]
answers = model.generate([prompt(string) for string, _ in requests], [name for _, name in requests], max_new_tokens=10)
for name in adapters:
    task = TASKS[{None: "base", "shout": "upper"}.get(name, name)]
    right = [
        answer.text == task(string)
        for (string, adapter), answer in zip(requests, answers, strict=True)
        if adapter == name
    ]
    print(f"{name or 'base':8} {sum(right)} of {len(right)}")
