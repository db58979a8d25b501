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
# # Three adapters trained in one run
#
# You will see three LoRA adapters learn three tasks in the same training steps: their losses, what their experts have
# learnt, and their answers on unseen strings. You will also see that an adapter without examples in a batch is left
# bit-for-bit unchanged, optimizer state included.
#
# One jitted step updates every adapter of a batch. Each adapter has its own layout, loss, optimizer and schedule; the
# base model is frozen.
#
# To run it: `pip install ".[notebooks]"` in a clone of the repository, which includes the base model. A CPU is enough;
# it takes a few minutes.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe_lora import BASE_SLOT, Model, plots
from jax_moe_lora.demo import TASKS, data_folder, heldout_strings, is_held_out, prompt, random_string
from jax_moe_lora.models.decoder import adapter_sites
from jax_moe_lora.training import AdapterSpec, Batch, init_params, init_state, make_step, to_adapter

plots.show_as_svg()
model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=4)
sites = adapter_sites(model.config)
modules = ("q", "k", "v", "o", "gate", "up", "down")
specs = {
    "upper": AdapterSpec(rank=16, layout="fused", targets=modules),
    "reverse": AdapterSpec(rank=16, layout="per-expert", targets=modules),
    "shift": AdapterSpec(rank=16, layout="shared-outer", targets=modules),
    "waiting": AdapterSpec(rank=4),  # never gets an example
}
trained = ["upper", "reverse", "shift"]
STEPS = 200
optimizers = {name: optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS), weight_decay=0.01) for name in specs}
params = {name: init_params(spec, sites, jax.random.key(slot)) for slot, (name, spec) in enumerate(specs.items())}
for name, leaves in params.items():
    print(f"{name:8} {specs[name].layout:12} {sum(leaf.size for leaf in leaves.values()):6} parameters")

# %% [markdown]
# ## A batch
#
# Each row is an example: a prompt and its answer. `slots` says which adapter a token trains, and `weights` which tokens
# count in the loss: those of the answer. (`Trainer` and `jax-moe-lora train` make such batches from JSONL files.)

# %%
import random

rng = random.Random(0)


def make_batch(names, rows=12, width=20):
    """A batch of `rows` examples for each name."""
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
# All three losses fall together, each on its own examples. Every tenth step, the loop also keeps the singular values of
# each expert's update of `down`, the expert's output projection. They are computed from A and B; the product `B @ A` is
# never formed.

# %%
from jax_moe_lora.inspect import delta_norm, effective_rank, spectra

step = make_step(model.config, specs, optimizers, clip=1.0)
state = init_state(jax.tree.map(jnp.copy, params), optimizers)
losses, history = [], []
for number in range(STEPS):
    if number % 10 == 0:
        adapters = {name: to_adapter(state.params[name], specs[name], sites, name) for name in trained}
        history.append({name: spectra(adapter, "down")[1] for name, adapter in adapters.items()})
    state, metrics = step(state, model.params, make_batch(trained))
    losses.append(metrics.losses.loss)
losses = np.asarray(jnp.stack(losses))  # [steps, slots]
axes = plots.lines(
    np.arange(STEPS),
    {name: losses[:, slot] for slot, name in enumerate(trained)},
    title="Loss of each adapter on its own examples",
    xlabel="step",
    ylabel="nats per token",
    logy=True,
)

# %% [markdown]
# ## What the experts have learnt
#
# The norm of each expert's update of `down`, and the update's effective rank: the number of directions it really uses,
# at most the 16 that the adapter has. In the shared-outer layout, all experts share one B for `down`.

# %%
adapters = {name: to_adapter(state.params[name], specs[name], sites, name) for name in trained}
values = {}
for name, adapter in adapters.items():
    layers, values[name] = spectra(adapter, "down")  # [L, E, R]
experts = range(model.config.moe.num_experts)
panels = {name: f"{name} ({specs[name].layout})" for name in trained}
axes = plots.heatmaps(
    {panels[name]: delta_norm(singular) for name, singular in values.items()},
    layers,
    experts,
    title="Norm of each expert's update of down",
    label="Frobenius norm",
    xlabel="expert",
    ylabel="layer",
    digits=1,
)
axes = plots.heatmaps(
    {panels[name]: effective_rank(singular) for name, singular in values.items()},
    layers,
    experts,
    title="Effective rank of each expert's update of down (at most 16)",
    label="effective rank",
    xlabel="expert",
    ylabel="layer",
    digits=1,
)

# %% [markdown]
# The updates grow quickly at first and settle as the learning rate decays.

# %%
norms = {name: np.stack([delta_norm(kept[name]) for kept in history]) for name in trained}  # [times, L, E]
axes = plots.lines(
    np.arange(0, STEPS, 10),
    {name: norm.mean((1, 2)) for name, norm in norms.items()},
    title="Norm of the update of down, mean over layers and experts",
    xlabel="step",
    ylabel="Frobenius norm",
)

# %% [markdown]
# ## An adapter without examples does not move
#
# Neither weight decay nor momentum touches it. `waiting` had no example in the whole run: its parameters, its optimizer
# state and its position in the schedule are bit-for-bit those at the start. One more step with examples of `upper` only
# changes `upper` and nothing else.


# %%
def state_bytes(state, name):
    """The bytes of an adapter's parameters, optimizer state and number of updates."""
    parts = state.params[name], state.optimizer_states[name], state.updates[name]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(parts)]


unchanged = state_bytes(init_state(params, optimizers), "waiting") == state_bytes(state, "waiting")
print(f"waiting  unchanged by {STEPS} steps: {unchanged}")
before = jax.device_get(state)
state, _ = step(state, model.params, make_batch(["upper"] * 3))
for name in specs:
    print(f"{name:8} unchanged by a batch of upper: {state_bytes(state, name) == state_bytes(before, name)}")

# %% [markdown]
# ## The trained adapters in one batch
#
# Exact matches on 20 strings that no adapter was trained on: the base model beside the adapter of the task. All
# requests share one batch. (`write_adapter` saves an adapter as a folder that PEFT reads.)

# %%
strings = heldout_strings(20)
for name, adapter in adapters.items():
    model.load_adapter(adapter, name)
requests = [(string, task, name) for string in strings for task in trained for name in (None, task)]
answers = model.generate(
    [prompt(string) for string, *_ in requests], [name for *_, name in requests], max_new_tokens=10
)
right = {}
for (string, task, name), answer in zip(requests, answers, strict=True):
    right.setdefault((task, name), []).append(answer.text == TASKS[task](string))
for task in trained:
    print(f"{task:8} base model {sum(right[task, None]):2}, adapter {sum(right[task, task]):2} of {len(strings)}")
