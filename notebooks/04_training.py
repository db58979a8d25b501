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
# # Three adapters, one training run
#
# One jitted step updates every adapter of a batch: each example names its slot, each adapter has its own layout, loss,
# optimizer and schedule, and the base model is frozen. A fourth adapter gets no example at all.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe_lora import BASE_SLOT, Model, plots
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.demo.tasks import TASKS, heldout_strings, is_held_out, prompt, random_string
from jax_moe_lora.models.decoder import adapter_sites
from jax_moe_lora.training import AdapterSpec, Batch, init_params, init_state, make_step, to_adapter

model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=4)
sites = adapter_sites(model.config)
targets = ("q", "k", "v", "o", "gate", "up", "down")
specs = {
    "upper": AdapterSpec(rank=16, layout="fused", targets=targets),
    "reverse": AdapterSpec(rank=16, layout="per-expert", targets=targets),
    "shift": AdapterSpec(rank=16, layout="shared-outer", targets=targets),
    "waiting": AdapterSpec(rank=4),
}
STEPS = 200
optimizers = {name: optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS), weight_decay=0.01) for name in specs}
params = {name: init_params(spec, sites, jax.random.key(slot)) for slot, (name, spec) in enumerate(specs.items())}
for name, own in params.items():
    print(f"{name:8} {specs[name].layout:12} {sum(leaf.size for leaf in own.values()):6} parameters")

# %% [markdown]
# ## A batch
#
# Rows of prompts and answers. `slots` says whose example a token belongs to, `weights` which losses count: those of the
# answer. (`Trainer` and `jax-moe-lora train` make such batches out of JSONL files.)

# %%
import random

rng = random.Random(0)


def batch(names, rows=12, width=20):
    """`rows` examples of each task."""
    shape = rows * len(names), width
    tokens, positions, segments, targets = np.zeros((4, *shape), np.int32)
    slots, weights = np.full(shape, BASE_SLOT, np.int32), np.zeros(shape, np.float32)
    for row, name in enumerate(names * rows):
        while is_held_out(text := random_string(rng, rng.randint(3, 8))):
            pass
        ids = [*model.tokenizer.encode(prompt(text) + TASKS[name](text)), *model.config.eos_token_ids[:1]]
        end = len(ids) - 1
        tokens[row, :end], targets[row, :end] = ids[:-1], ids[1:]
        positions[row, :end], segments[row, :end] = range(end), 1
        slots[row, :end], weights[row, len(text) : end] = list(specs).index(name), 1
    return Batch(*map(jnp.asarray, (tokens, positions, segments, slots, targets, weights)))


# %% [markdown]
# ## The run
#
# Every tenth step keeps the singular values of each expert's update of `down`, which come from A and B without ever
# making `B @ A`.

# %%
from jax_moe_lora.inspect import delta_norm, effective_rank, spectra

step = make_step(model.config, specs, optimizers, clip=1.0)
state = init_state(jax.tree.map(jnp.copy, params), optimizers)
trained = ["upper", "reverse", "shift"]
losses, seen = [], []
for number in range(STEPS):
    if number % 10 == 0:
        adapters = {name: to_adapter(state.params[name], specs[name], sites, name) for name in trained}
        seen.append({name: spectra(adapter, "down")[1] for name, adapter in adapters.items()})
    state, metrics = step(state, model.params, batch(trained))
    losses.append(metrics.losses.loss)
losses = np.asarray(jnp.stack(losses))  # [steps, S]
axes = plots.lines(
    np.arange(STEPS),
    {name: losses[:, slot] for slot, name in enumerate(trained)},
    title="Loss of each adapter on its own tokens",
    xlabel="step",
    ylabel="nats a token",
    logy=True,
)

# %% [markdown]
# ## What the experts have learnt
#
# Norm of each expert's update of `down`, and its effective rank, which is at most the 16 that an adapter has: how many
# directions it really uses. In the shared-outer layout all experts have one B for `down`.

# %%
adapters = {name: to_adapter(state.params[name], specs[name], sites, name) for name in trained}
values = {}
for name, adapter in adapters.items():
    layers, values[name] = spectra(adapter, "down")  # [L, E, R]
experts = range(model.config.moe.num_experts)
names = {name: f"{name} ({specs[name].layout})" for name in trained}
axes = plots.heatmaps(
    {names[name]: delta_norm(own) for name, own in values.items()},
    layers,
    experts,
    title="Norm of each expert's update of down",
    label="Frobenius norm",
    xlabel="expert",
    ylabel="layer",
    digits=1,
)
axes = plots.heatmaps(
    {names[name]: effective_rank(own) for name, own in values.items()},
    layers,
    experts,
    title="Effective rank of each expert's update of down (at most 16)",
    label="effective rank",
    xlabel="expert",
    ylabel="layer",
    digits=1,
)

# %%
history = {name: np.stack([delta_norm(kept[name]) for kept in seen]) for name in trained}  # [times, L, E]
axes = plots.lines(
    np.arange(0, STEPS, 10),
    {name: own.mean((1, 2)) for name, own in history.items()},
    title="Growth of the update of down, mean over layers and experts",
    xlabel="step",
    ylabel="Frobenius norm",
)

# %% [markdown]
# ## Who is not in a batch does not move
#
# Neither by weight decay nor by momentum, bit for bit: the fourth adapter in the whole run, and the others in one more
# step that has examples of `upper` alone.


# %%
def bits(state, name):
    """Params, optimizer state and the place in its schedule."""
    kept = state.params[name], state.optimizer_states[name], state.updates[name]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]


untouched = bits(init_state(params, optimizers), "waiting") == bits(state, "waiting")
print(f"waiting  unchanged by {STEPS} steps: {untouched}")
before = jax.device_get(state)
state, _ = step(state, model.params, batch(["upper"] * 3))
for name in specs:
    print(f"{name:8} unchanged by a batch of upper: {bits(state, name) == bits(before, name)}")

# %% [markdown]
# ## All of them in one batch
#
# Exact match on strings that none was trained on, of the base model and of the adapter. `write_adapter` makes folders
# of them that PEFT reads.

# %%
strings = heldout_strings(20)
for name, adapter in adapters.items():
    model.load_adapter(adapter, name)
jobs = [(string, task, name) for string in strings for task in trained for name in (None, task)]
outs = model.generate([prompt(string) for string, *_ in jobs], [name for *_, name in jobs], max_new_tokens=10)
right = {}
for (string, task, name), out in zip(jobs, outs, strict=True):
    right.setdefault((task, name), []).append(out.text == TASKS[task](string))
for task in trained:
    print(f"{task:8} base {sum(right[task, None]):2}, adapter {sum(right[task, task]):2} of {len(strings)}")
