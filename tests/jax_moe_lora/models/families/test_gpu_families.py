"""A family of each kind of block on a GPU: the kernels' bfloat16 beside float32 by XLA, adapters on everything."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.benchmark.random_model import random_bank
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import init_params
from pallas_kernels.ops import BASE_SLOT
from pallas_kernels.specs import AdapterMix
from support.networks import FAMILIES, TINY
from support.real_configs import read

pytestmark = pytest.mark.gpu("hopper")

# Every token goes to every expert: rounding cannot send it elsewhere.
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
}
WIDTHS = {
    "vocab_size": 320,
    "hidden_size": 256,
    "num_hidden_layers": 1,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "head_dim": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "global_head_dim": 128,
    "intermediate_size": 128,
}
OWN: dict[str, dict[str, Any]] = {
    # sinks, windows, biases, clamped SwiGLU
    "gpt_oss": {},
    # latent attention, sigmoid router, shared experts
    "deepseek_v3": {"first_k_dense_replace": 0},
    # delta-net, shared expert with a gate
    "qwen3_5_moe_text": {"layer_types": ["linear_attention"], "linear_conv_kernel_dim": 4},
    # window, a dense MLP beside the experts, soft-cap
    "gemma4_text": {
        "layer_types": ["sliding_attention"],
        "num_experts_per_tok": None,
        "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    # gated attention, partial rotary
    "qwen3_next": {"layer_types": ["full_attention"], "linear_conv_kernel_dim": 4},
    # multipliers, fused shared MLP
    "granitemoeshared": {"shared_intermediate_size": 128},
}
KEYS = {"qwen3_5_moe_text": "qwen3_5_moe"}  # of `networks.FAMILIES`, where it differs
PROMPT, STEPS = 96, 4
LENGTHS = np.asarray([96, 17, 1, 64, 33])
SLOTS = np.asarray([0, 1, 2, BASE_SLOT, 0])


def config_of(model_type: str):
    raw = {"model_type": model_type, **TINY, **FAMILIES[KEYS.get(model_type, model_type)]}
    raw |= {name: value for name, value in (WIDTHS | EXPERTS).items() if name in raw}
    raw |= {"hidden_act": "silu"} | OWN[model_type]
    return read({name: value for name, value in raw.items() if value is not None})


@cache
def programs(config, implementation: str | None):
    """Prefill and decode, compiled once, without timing XLA's choices of small matmuls."""
    return [
        jax.jit(
            partial(function, config=config, implementation=implementation),
            compiler_options={"xla_gpu_autotune_level": 0},
        )
        for function in (decoder.prefill, decoder.decode)
    ]


def run(config, params, bank, slots, dtype: str, implementation: str | None) -> np.ndarray:
    """Logits `[1 + STEPS, B, V]` of prompts and of decode steps with given tokens."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (len(LENGTHS), PROMPT + STEPS)).astype(np.int32)
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        prefill, decode = programs(config, implementation)
        kept = decoder.init_cache(config, len(LENGTHS), PROMPT + STEPS, dtype)
        first = jnp.asarray(tokens[:, :PROMPT]), jnp.asarray(LENGTHS, jnp.int32)
        kept, logits = prefill(params, bank, kept, *first, slots)
        found = [logits]
        for step in range(STEPS):
            kept, logits = decode(params, bank, kept, jnp.asarray(tokens[:, PROMPT + step]), slots)
            found.append(logits)
    return np.asarray(jnp.stack(found))


@pytest.mark.parametrize("model_type", OWN)
def test_a_family_by_kernels_is_close_to_float32_and_mixed_equals_solo(model_type):
    config = config_of(model_type)
    params = init_params(config, jax.random.key(0), "bfloat16")
    bank = random_bank(decoder.layer_sites(config), AdapterMix(3, (16, 40, 8)))
    slots = jnp.asarray(SLOTS, jnp.int32)
    mixed = run(config, params, bank, slots, "bfloat16", None)
    assert np.isfinite(mixed).all()
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, (params, bank))
    expected = run(config, *wide, slots, "float32", "xla")
    error = np.linalg.norm(mixed - expected) / np.linalg.norm(expected)
    print(f"\n{model_type}: relative error {error:.1e}")
    assert error < 3e-2
    base = run(config, params, bank, jnp.full_like(slots, BASE_SLOT), "bfloat16", None)
    with_adapter = SLOTS != BASE_SLOT
    np.testing.assert_array_equal(mixed[:, ~with_adapter], base[:, ~with_adapter])
    assert (mixed[:, with_adapter] != base[:, with_adapter]).any(-1).all(), "the adapters change nothing"
    for slot in range(3):
        solo = run(config, params, bank, jnp.where(slots == slot, slots, BASE_SLOT), "bfloat16", None)
        np.testing.assert_array_equal(solo[:, slot == SLOTS], mixed[:, slot == SLOTS])
