"""Ling and Ring 2.0 (Bailing): half of each head turned, experts in groups, checkpoints of Sarvam's form.

transformers has no class for it. The facts are those of the published one, `BailingMoeV2ForCausalLM`
(github.com/inclusionAI/Ling-V2, `models/modeling_bailing_moe_v2.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields
from jax_moe_lora.models.families import sarvam_moe
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.model import ModelConfig

# What the class does whatever its config says.
NEUTRAL: Values = {
    **sarvam_moe.NEUTRAL,
    "norm_topk_prob": (True,),
    "router_dtype": ("fp32",),
    "use_rmsnorm": (True,),
}
# The class gives each shared expert the width of a routed one; the factor is that of a loss.
ANY_VALUE = (*sarvam_moe.ANY_VALUE, "moe_shared_expert_intermediate_size", "mtp_loss_scaling_factor")
# What the class has for a config that says nothing of them.
DEFAULTS: Mapping[str, Any] = {"head_dim": 128, "n_group": 8, "topk_group": 4}


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name; Ling 1, whose router
        is another one.
    """
    _check_router(Fields(raw, source))
    fields = open_fields({**DEFAULTS, **raw}, source, NEUTRAL, ANY_VALUE)
    return sarvam_moe.read_decoder(fields, generation, theta=6e5, scaling=1.0, model_type="bailing_moe")


def _check_router(fields: Fields) -> None:
    """Refuses Ling 1, which has the same model type, and what the class does otherwise with a single expert."""
    if not fields.flag("moe_router_enable_expert_bias", False):
        problem = (
            "moe_router_enable_expert_bias is not true: the model of Ling 1 is not supported. Its routed experts alone "
            'run through jax_moe_lora.moe_lora with MoEConfig(..., router="softmax_topk")'
        )
        raise fields.error(problem, "moe_router_enable_expert_bias")
    if fields.get("num_experts_per_tok") == 1:
        raise fields.error("num_experts_per_tok is 1, whose weight is not renormalised", "num_experts_per_tok")
    if not fields.flag("norm_topk_prob", True):
        raise fields.error("norm_topk_prob is false, but the class always renormalises", "norm_topk_prob")


FAMILY = replace(
    sarvam_moe.FAMILY,
    model_type="bailing_moe",
    read_config=read_config,
    refuses="Ling 1 (its softmax router), a quantised tensor for q, k and v",
)
