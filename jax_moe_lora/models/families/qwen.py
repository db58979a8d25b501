"""What the configs of Qwen2-MoE and Qwen3-MoE have in common."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_moe, read_sparse_layers
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values


def open_qwen(raw: Mapping[str, Any], source: str, neutral: Values) -> Fields:
    """The fields of a config without sliding windows.

    Args:
      raw: the config.
      source: what errors call the file.
      neutral: what the family's class does whatever its config says, as in `neutral_fields.ONE_VALUE`.
    """
    fields = open_fields(raw, source, neutral, any_value=("max_window_layers", "sliding_window"))
    fields.expect("use_sliding_window", (None, False), "sliding-window attention is not supported")
    return fields


def common(fields: Fields) -> dict[str, Any]:
    """Arguments of `read_decoder`."""
    routed = read_sparse_layers(fields)
    no_dense_layer = all(routed) and not fields.get("intermediate_size")
    return {
        "moe": read_moe(fields, "moe_intermediate_size", fields.flag("norm_topk_prob", False)),
        "moe_layers": routed,
        "mlp_width": 0 if no_dense_layer else fields.size("intermediate_size"),
        "default_eps": 1e-6,
    }
