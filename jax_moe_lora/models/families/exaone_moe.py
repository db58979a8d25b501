"""K-EXAONE."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.models.decoder_config import (
    open_fields,
    read_activation,
    read_gqa,
    read_layers,
    read_model,
    read_norm,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import SIGMOID, read_sigmoid_routed
from jax_moe_lora.models.families.windows import read_windows
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

SPARSE, DENSE = "sparse", "dense"

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {
    **SIGMOID,
    **dict.fromkeys(QK_NORM, (True,)),
    **dict.fromkeys(("attention_bias", *QKV_BIAS), (False,)),
}
# Layers that predict further tokens are not read; of the first dense layers there are two spellings more.
ANY_VALUE = ("first_last_k_dense_replace", "is_moe_layer", "num_nextn_predict_layers")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-5)
    attention = read_gqa(fields, norm=norm, qk_norm="head")
    routed = read_sigmoid_routed(
        fields, ("num_experts", "num_local_experts"), "num_shared_experts", renormalize=True, scaling=2.5
    )
    dense = DenseMLP(fields.size("intermediate_size"), read_activation(fields))
    windows, has_windows = _read_windows(fields), fields.get("sliding_window") is not None
    layers = [
        LayerSpec(
            # Where layers with a window have positions, the others have none.
            replace(attention, window=window, rope=attention.rope if window or not has_windows else None),
            routed if kind == SPARSE else dense,
            norm,
        )
        for window, kind in zip(windows, _read_mlp_types(fields), strict=True)
    ]
    return read_model(fields, generation, layers, model_type="exaone_moe")


def _read_windows(fields: Fields) -> tuple[int | None, ...]:
    """The window of each layer: by default all but every `sliding_window_pattern`-th have one."""
    if fields.get("layer_types") is not None:  # then the pattern says nothing: it may be of another form, "LLLG"
        fields.get("sliding_window_pattern")
        return read_windows(fields, lambda layer: False)
    pattern = fields.size("sliding_window_pattern", 4)
    return read_windows(fields, lambda layer: (layer + 1) % pattern != 0)


def _read_mlp_types(fields: Fields) -> list[str]:
    count, types = read_layers(fields), fields.get("mlp_layer_types")
    first_routed = fields.count("first_k_dense_replace", 1)
    if types is None and isinstance(routed := fields.get("is_moe_layer"), list):
        types = [SPARSE if here else DENSE for here in routed]
        if types != [DENSE if layer < first_routed else SPARSE for layer in range(count)]:
            problem = f"is_moe_layer is {routed!r}, but first_k_dense_replace is {first_routed}"
            raise fields.error(f"{problem}, which alone transformers reads", "is_moe_layer")
    if types is None:
        return [DENSE if layer < first_routed else SPARSE for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in (SPARSE, DENSE) for kind in types):
        expected = f"{count} of {SPARSE} and {DENSE} were expected"
        raise fields.error(f"mlp_layer_types is {types!r}, {expected}", "mlp_layer_types")
    return types


FAMILY = Family(
    "exaone_moe",
    read_config,
    paths={"choice_bias": ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias")},
    unused={r"(model\.)?mtp\..*": "a layer that predicts further tokens (MTP)"},
)
