"""Times a training step of a model of random weights with adapters on its experts, beside transformers and PEFT."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.random_model import DTYPE
from jax_moe_lora.errors import InputError
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import init_params
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training import AdapterSpec, Batch, init_state, make_step
from jax_moe_lora.training import init_params as init_adapter

RATE, REPEATS, QUEUED = 1e-4, 5, 3
METHOD = (
    f"{QUEUED} steps dispatched one after the other, then one block, per step, median of {REPEATS} after a warm-up; "
    "AdamW; weights bfloat16, adapters float32 on the experts (gate and up of an expert share their A, as PEFT makes "
    "them); full rows of random tokens, one example each, all of them learnt; rows go round over the adapters. "
    "peak_gb: what the step holds at once: for jax its arguments, results and temporaries as compiled, for torch "
    "max_memory_allocated. transformers: grouped_mm experts, sdpa attention, PEFT's target_parameters; several "
    "adapters one after the other, each on its own rows, and one update"
)


def measure(config: ModelConfig, adapters: int, rank: int, batch: int, length: int) -> dict[str, Any]:
    """Times one step of this library.

    Args:
      config: the model.
      adapters: adapters trained at once; the rows belong to them in turn.
      rank: the adapters' rank.
      batch: rows.
      length: tokens per row.

    Returns:
      Milliseconds per step, peak memory in GB and seconds of compilation.

    Raises:
      ArithmeticError: a loss is not finite.
    """
    spec = AdapterSpec(rank=rank)
    specs = {f"adapter{index}": spec for index in range(adapters)}
    sites = decoder.layer_sites(config)
    optimizers = {name: optax.adamw(RATE) for name in specs}
    params = {name: init_adapter(spec, sites, jax.random.key(index)) for index, name in enumerate(specs)}
    model = jax.block_until_ready(init_params(config, jax.random.key(100), DTYPE))
    state = init_state(params, optimizers)
    data = draw_batch(config, adapters, batch, length)
    began = time.perf_counter()
    step = make_step(config, specs, optimizers).lower(state, model, data).compile()  # type: ignore[attr-defined]
    compile_s, memory = time.perf_counter() - began, step.memory_analysis()
    states = [state]

    def run() -> None:
        states[0], metrics = step(states[0], model, data)
        run.losses = metrics.losses.loss  # type: ignore[attr-defined]

    ms = step_ms(run, lambda: jax.block_until_ready(states[0]))
    losses = np.asarray(run.losses)  # type: ignore[attr-defined]
    if not np.isfinite(losses).all():
        raise ArithmeticError(f"losses are {losses.tolist()}")
    sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    peak = sum(getattr(memory, size) for size in sizes) - memory.alias_size_in_bytes
    return {"ms": ms, "peak_gb": round(peak / 1e9, 2), "compile_s": round(compile_s, 1)}


def draw_batch(config: ModelConfig, adapters: int, batch: int, length: int) -> Batch:
    """A batch of full rows of random tokens.

    Args:
      config: the model.
      adapters: number of adapters; the rows belong to them in turn.
      batch: rows.
      length: tokens per row.

    Returns:
      The batch.
    """
    tokens = jax.random.randint(jax.random.key(7), (batch, length + 1), 0, config.vocab_size, jnp.int32)
    shape = (batch, length)
    return Batch(
        tokens[:, :-1],
        jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
        jnp.ones(shape, jnp.int32),
        jnp.broadcast_to((jnp.arange(batch, dtype=jnp.int32) % adapters)[:, None], shape),
        tokens[:, 1:],
        jnp.ones(shape, jnp.float32),
        packed=False,
    )


def step_ms(run: Callable[[], Any], wait: Callable[[], Any]) -> float:
    """Milliseconds per step, after two steps that do not count.

    Args:
      run: starts a step.
      wait: waits for all steps.

    Returns:
      The median.
    """
    for _ in range(2):
        run()
    wait()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(QUEUED):
            run()
        wait()
        times.append((time.perf_counter() - began) / QUEUED * 1e3)
    return round(statistics.median(times), 2)


def floor_ms(config: ModelConfig, rank: int, tokens: int, ceilings: Ceilings) -> float:
    """The time of a step's multiplications, forward and backward, at the device's matmul speed.

    The base is frozen, so only its rows have gradients. Attention's scores, which flash kernels compute again, are left
    out, and so is all memory traffic.

    Args:
      config: the model.
      rank: the adapters' rank.
      tokens: tokens of a step.
      ceilings: the device's limits.

    Returns:
      Milliseconds.
    """
    moe, width, layer = config.moe, config.hidden_size, config.layers[0]
    attention = sum(math.prod(row.shape) for row in layer.attention.parameters(width) if row.projection)
    experts = moe.top_k * 3 * width * moe.expert_width
    lora = moe.top_k * rank * (3 * width + 4 * moe.expert_width)  # A shared by gate and up; A, B, and down's two
    router = width * moe.num_experts
    layers = config.num_layers * (2 * (attention + experts + router) + 3 * lora)  # lora: of its matrices too
    head = 2 * width * config.vocab_size
    return 2 * tokens * (layers + head) / ceilings.flop_per_s * 1e3


def measure_peft(config: ModelConfig, adapters: int, rank: int, batch: int, length: int) -> dict[str, Any]:
    """Times the same step of transformers and PEFT, on a CUDA device.

    Args:
      config: the model.
      adapters: adapters trained one after the other, each on its own rows.
      rank: the adapters' rank.
      batch: rows.
      length: tokens per row.

    Returns:
      Milliseconds per step and peak memory in GB.

    Raises:
      InputError: a model of another family than Qwen3-MoE.
    """
    import peft
    import torch
    import transformers

    attention = config.layers[0].attention
    if config.model_type != "qwen3_moe" or not isinstance(attention, GQA):
        raise InputError(f"the model's family is {config.model_type}; the peer is timed with qwen3_moe alone.")
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.expert_width,
        "norm_topk_prob": True,
    }
    with torch.device("cuda"):
        model: Any = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    model = model.to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
    names = [f"adapter{index}" for index in range(adapters)]
    trained = peft.get_peft_model(model, lora, adapter_name=names[0])
    for name in names[1:]:
        trained.add_adapter(name, lora)
    weights = [weight for name, weight in trained.named_parameters() if "lora_" in name]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    tokens = torch.from_numpy(np.asarray(draw_batch(config, adapters, batch, length).tokens).astype(np.int64)).cuda()

    def run() -> None:
        for index, name in enumerate(names):
            trained.set_adapter(name)
            rows = tokens[index::adapters]
            trained(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ms = step_ms(run, torch.cuda.synchronize)
    return {"ms": ms, "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}
