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
# # One batch, many adapters
#
# A small Qwen3-MoE checkpoint ships with the package. Its base model copies what it reads; each of its LoRA adapters,
# trained with transformers and PEFT, does something else. Here all of them answer in one batch.

# %%
from jax_moe_lora import Model, count_compilations
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.demo.tasks import TASKS, heldout_strings, prompt

model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=8)
for folder in sorted((data_folder() / "adapters").iterdir()):
    info = model.load_adapter(folder, adapter_name=folder.name)
    print(f"{info.name:8} slot {info.slot}, {info.nbytes / 1024:.0f} KiB, ranks {info.ranks}")

# %% [markdown]
# The adapters differ in layout (3-D expert parameters, per-expert matrices), in what they touch (experts alone, or
# attention and router too) and in rank. They share a batch all the same: a request names its adapter, and `None` is the
# base model.

# %%
names = [None, *model.adapters]
text = heldout_strings(1)[0]
outs = model.generate([prompt(text)] * len(names), names, max_new_tokens=10)
for out in outs:
    print(f"{out.adapter_name or 'base':8} {prompt(text)} {out.text}")

# %% [markdown]
# ## Mixed equals solo, bit for bit
#
# A row's result does not depend on the adapters of its neighbours. Solo is the same program with every other row on the
# base model.

# %%
import numpy as np

tokens = np.asarray([model.tokenizer.encode(prompt(text))] * len(names))
mixed = model.logits(tokens, names)
for row, name in enumerate(names):
    solo = model.logits(tokens, [name if index == row else None for index in range(len(names))])
    print(f"{name or 'base':8} equal bits: {bool((mixed[row] == solo[row]).all())}")

# %% [markdown]
# ## How far each adapter moves the model
#
# Logits after the prompt, minus those of the base model: each adapter pushes its own answer up.

# %%
from jax_moe_lora import plots

last = np.asarray(mixed[:, -1])
letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
columns = [model.tokenizer.encode(letter)[-1] for letter in letters]
shift = (last - last[0])[1:, columns]
axes = plots.heatmaps(
    {"": shift},
    names[1:],
    letters,
    title=f"Change of the next-letter logits after “{prompt(text)}”, adapter minus base model",
    label="logit change",
    xlabel="next letter",
    diverging=True,
)

# %% [markdown]
# ## Adapters come and go, nothing recompiles

# %%
with count_compilations() as count:
    model.unload_adapter("upper")
    model.load_adapter(data_folder() / "adapters" / "upper", "shout")
    mix = ["shout", "reverse", *["sort", None] * len(names)][: len(names)]
    outs = model.generate([prompt(text)] * len(names), mix, max_new_tokens=10)
print([(out.adapter_name, out.text) for out in outs], f"compilations: {count.compilations}")

# %% [markdown]
# ## Exact match on strings that no adapter was trained on

# %%
strings = heldout_strings(24)
adapters = [None, *model.adapters]
jobs = [(string, name) for string in strings for name in adapters]
answers = model.generate([prompt(string) for string, _ in jobs], [name for _, name in jobs], max_new_tokens=10)
for name in adapters:
    task = TASKS[{None: "base", "shout": "upper"}.get(name, name)]
    right = [out.text == task(string) for (string, own), out in zip(jobs, answers, strict=True) if own == name]
    print(f"{name or 'base':8} {sum(right)} of {len(right)}")
