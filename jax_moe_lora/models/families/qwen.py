"""What the configs of Qwen2-MoE and Qwen3-MoE have in common."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_moe, read_sparse_layers
from jax_moe_lora.models.fields import Fields


def open_qwen(raw: Mapping[str, Any], source: str) -> Fields:
    """The fields of a config without sliding windows."""
    fields = open_fields(raw, source, harmless=("max_window_layers", "sliding_window"))
    fields.expect("use_sliding_window", (None, False), "sliding-window attention is not supported")
    return fields


def common(fields: Fields) -> dict[str, Any]:
    """Arguments of `read_decoder`."""
    return {
        "moe": read_moe(fields, "moe_intermediate_size", fields.flag("norm_topk_prob", False)),
        "moe_layers": read_sparse_layers(fields),
        "mlp_width": fields.size("intermediate_size"),
        "default_eps": 1e-6,
    }
