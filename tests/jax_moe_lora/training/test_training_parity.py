"""Training beside transformers + PEFT: the same curves, the same adapters, and files that PEFT loads."""

import math
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_moe_lora import write_adapter
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.models import decoder
from jax_moe_lora.training import Batch, from_adapter, make_step, to_adapter
from jax_moe_lora.training.training_bank import training_bank
from support.layers import assert_close
from support.models import ADAPTER_NAMES
from support.networks import ATTENTION, EXPERTS, load_peft
from support.trained import CONFIG, MODEL, SITES, SPECS, model, new_params, state_of, task_batch

# Optimised: a hundred steps run in a quarter of the time.
pytestmark = [pytest.mark.parity, pytest.mark.optimised, pytest.mark.xdist_group("training parity")]

STEPS, WARMUP, ROUTER_LOSS, CLIP = 100, 10, 0.01, 1.0
# name -> (PEFT's arguments, learning rate, weight decay)
RUNS = {
    "reverse": (
        {
            "r": 8,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "target_parameters": ["mlp.gate.weight", *EXPERTS],
        },
        1e-3,
        0.01,
    ),
    "upper": ({"r": 20, "lora_alpha": 20, "init_lora_weights": "gaussian", "target_parameters": EXPERTS}, 5e-4, 0.0),
}


def rate(step, peak: float, cos=math.cos, least=min):
    """Warm-up, then a cosine; with `jnp`'s functions for a traced step."""
    return peak * least(1.0, (step + 1) / WARMUP) * (0.1 + 0.45 * (1 + cos(math.pi * step / STEPS)))


def batch_of(index: int) -> Batch:
    return task_batch([*RUNS], index, 12, specs=RUNS)


def new_peft(name: str) -> Any:
    import peft
    import torch

    torch.manual_seed(sum(map(ord, name)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(load_peft(MODEL, None), peft.LoraConfig(**RUNS[name][0]))


def torch_run(network: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropies and router losses `[STEPS]` of PEFT's own training on the rows of one adapter."""
    import torch
    from torch.nn import functional

    _, peak, decay = RUNS[name]
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, peak=peak))
    losses, router_losses = [], []
    for index in range(STEPS):
        batch = batch_of(index)
        mine = np.asarray(batch.slots)[:, 0] == [*RUNS].index(name)
        tokens, targets, weight, real = (
            torch.tensor(np.asarray(values)[mine]).long()
            for values in (batch.tokens, batch.targets, batch.weights, batch.segments)
        )
        output = network(input_ids=tokens, attention_mask=real, output_router_logits=True)
        wanted = weight.bool()
        loss = functional.cross_entropy(output.logits[wanted], targets[wanted])
        optimizer.zero_grad()
        (loss + ROUTER_LOSS * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        router_losses.append(output.aux_loss.item())
    return np.array(losses), np.array(router_losses)


@pytest.mark.slow
def test_curves_and_adapters_are_those_of_peft(tmp_path):
    networks = {name: new_peft(name) for name in RUNS}
    params, specs = {}, {}
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
        params[name], specs[name] = from_adapter(read_adapter(tmp_path / name, SITES, ADAPTER_NAMES), SITES)
    optimizers = {
        name: optax.adamw(partial(rate, peak=peak, cos=jnp.cos, least=jnp.minimum), weight_decay=decay)
        for name, (_, peak, decay) in RUNS.items()
    }
    step = make_step(CONFIG, specs, optimizers, clip=CLIP, router_loss=ROUTER_LOSS)
    state, curves, router_curves = state_of(params, optimizers), [], []
    for index in range(STEPS):
        state, metrics = step(state, model(), batch_of(index))
        curves.append(np.asarray(metrics.losses.loss))
        router_curves.append(np.asarray(metrics.losses.router))
    for slot, (name, network) in enumerate(networks.items()):
        (expected, router), found = torch_run(network, name), np.array(curves)[:, slot]
        np.testing.assert_allclose(np.array(router_curves)[:, slot], router, rtol=1e-3, err_msg=name)
        assert found[-10:].mean() < 0.8 * found[:10].mean(), f"{name} learnt nothing"
        error = np.abs(found / expected - 1)
        assert error.max() <= 1e-4, f"{name}: step {error.argmax()} is off by {error.max():.2e}"
        network.save_pretrained(tmp_path / "trained" / name)
        theirs, _ = from_adapter(read_adapter(tmp_path / "trained" / name, SITES, ADAPTER_NAMES), SITES)
        assert {*theirs} == {*state.params[name]}
        for key, values in theirs.items():
            moved = np.linalg.norm(values - params[name][key]) / np.linalg.norm(values)
            assert moved > 1e-2, f"{name}: {key} did not move"
            assert_close(np.asarray(state.params[name][key]), np.asarray(values), 1e-3)


@pytest.mark.slow
def test_peft_loads_what_was_trained_with_equal_logits(tmp_path):
    import torch

    optimizers = dict.fromkeys(SPECS, optax.adam(1e-2))
    step, state = make_step(CONFIG, SPECS, optimizers), state_of(new_params(), optimizers)
    for index in range(4):
        state, _ = step(state, model(), task_batch([*SPECS], index, 6))
    batch = task_batch([*SPECS], 99, 6)
    inputs = batch.tokens, batch.positions, batch.segments, batch.slots

    @jax.jit
    def logits(params, model):
        bank = training_bank(params, SPECS, SITES, CONFIG.num_layers)
        return decoder.packed_logits(model, bank, *inputs, config=CONFIG)

    found = np.asarray(logits(state.params, model()))
    for slot, (name, spec) in enumerate(SPECS.items()):
        adapter = to_adapter(state.params[name], spec, SITES, name)
        write_adapter(adapter, tmp_path / name, SITES, ADAPTER_NAMES, "peft", expand=True, fold_scale=True)
        with torch.no_grad():
            expected, base = (
                load_peft(MODEL, folder)(torch.tensor(np.asarray(batch.tokens))).logits.numpy()
                for folder in (tmp_path / name, None)
            )
        mine = np.asarray(batch.slots) == slot
        assert_close(found[mine], expected[mine], 1e-5)
        assert np.linalg.norm(expected[mine] - base[mine]) > 1e-2 * np.linalg.norm(base[mine]), name
