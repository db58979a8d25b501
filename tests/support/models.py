"""Configs of small decoders, and what a model makes of prompts."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora import Model
from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig


def decoder_config(
    model_type: str,
    vocab_size: int,
    hidden_size: int,
    heads: tuple[int, int, int],
    moe: MoEConfig,
    routed: tuple[bool, ...] = (True,),
    mlp_width: int = 0,
    shared_width: int = 0,
    **attention,
) -> ModelConfig:
    """A decoder with grouped-query attention.

    Args:
      model_type: a family.
      vocab_size: V.
      hidden_size: D.
      heads: query heads, key/value heads and the width of a head.
      moe: of the routed layers.
      routed: for each layer, whether its MLP is routed.
      mlp_width: inner width of the dense MLPs.
      shared_width: inner width of the shared expert, 0 for none.
      attention: further fields of `GQA`.
    """
    mixer = GQA(*heads, **({"rope": RopeConfig(), "qk_norm": "head"} | attention))
    shared = DenseMLP(shared_width, "silu", "shared", "mlp.shared_expert") if shared_width else None
    experts, dense = RoutedMLP(moe, shared=shared, shared_gate=bool(shared_width)), DenseMLP(mlp_width)
    return ModelConfig(
        model_type, vocab_size, hidden_size, tuple(LayerSpec(mixer, experts if here else dense) for here in routed)
    )


_SIZES = (32, 16, (2, 1, 8), MoEConfig(16, 12, 4, 2))
ADAPTER_NAMES = adapter_names(decoder_config("qwen3_moe", *_SIZES, (True, False), mlp_width=20))
"""Qwen3-MoE's names, of routed and of dense layers."""
MIXTRAL_NAMES = adapter_names(decoder_config("mixtral", *_SIZES))


def prefill_and_decode(model: Model, lengths: Sequence[int], max_length: int, steps: int) -> Callable[..., np.ndarray]:
    """A function of adapter names, and of another bank or none: logits `[1 + steps, B, V]` of a prefill and some steps.

    Tokens are random, and the same whatever the names are.

    Args:
      model: with its adapters.
      lengths: B real tokens of prompts.
      max_length: positions of the cache.
      steps: decode steps.
    """
    fn = model.functional(batch=len(lengths), max_length=max_length)
    prefill, decode = jax.jit(fn.prefill), jax.jit(fn.decode)
    shape = len(lengths), max(lengths)
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, shape).astype(np.int32)

    def logits(names: Sequence[str | None], bank=fn.bank) -> np.ndarray:
        slots = model.slots(names)
        cache, first = prefill(fn.params, bank, fn.init_cache(), jnp.asarray(tokens), jnp.asarray(lengths), slots)
        found = [first]
        for step in range(steps):
            cache, scores = decode(fn.params, bank, cache, jnp.asarray(tokens[:, step]), slots)
            found.append(scores)
        return np.stack(found)

    return logits
