"""Kimi K2: DeepSeek-V3 by another name."""

from jax_moe_lora.models.families.deepseek_v3 import family_like

FAMILY = family_like(
    "kimi_k2",
    unused={r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies that follow from the config"},
)
