"""The two jitted programs of generation: the prompts in, and one more token of each."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.serving.sampling import Sampling, sample
from pallas_kernels.ops import Implementation


@partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def start(
    params: ModelParams,
    bank: AdapterBank,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    sampling: Sampling,
    config: ModelConfig,
    implementation: Implementation | None,
) -> tuple[Cache, Int[Array, "B"]]:
    """Prefill and the first token."""
    cache, scores = decoder.prefill(
        params, bank, cache, tokens, lengths, slots, config=config, implementation=implementation
    )
    return cache, sample(scores, sampling, jnp.int32(0))


@partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="cache")
def advance(
    params: ModelParams,
    bank: AdapterBank,
    cache: Cache,
    tokens: Int[Array, "B"],
    slots: Int[Array, "B"],
    sampling: Sampling,
    index: Int[Array, ""],
    config: ModelConfig,
    implementation: Implementation | None,
) -> tuple[Cache, Int[Array, "B"]]:
    """One decode step and the token after it."""
    cache, scores = decoder.decode(params, bank, cache, tokens, slots, config=config, implementation=implementation)
    return cache, sample(scores, sampling, index)
