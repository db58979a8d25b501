"""What the configs of Qwen3-Next and Qwen3.5-MoE have in common: delta-net and full attention by turns."""

from collections.abc import Callable, Mapping, Sequence

from jax_moe_lora.models.decoder_config import read_activation, read_gqa, read_layers, read_norm
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.specs.delta_net import DeltaNet
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.parameter import Norm

PREDICTION: Mapping[str, str] = {r"mtp\..*": "layers that predict further tokens (MTP)"}
# Fields that say how further tokens are predicted, and what the classes do whatever their configs say.
NO_EFFECT = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype")


def read_mixers(fields: Fields, norm: Norm, by_key_head: bool) -> Sequence[GQA | DeltaNet]:
    """What mixes the tokens in each layer, by `layer_types`, or by `full_attention_interval` where there are none.

    Args:
      fields: the config's.
      norm: of the layers, and of the heads of full attention.
      by_key_head: as in `DeltaNet`.
    """
    count, interval = read_layers(fields), fields.size("full_attention_interval", 4)
    default = ["linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(count)]
    types = fields.get("layer_types", default)
    kinds: Mapping[str, Callable[[], GQA | DeltaNet]] = {
        "full_attention": lambda: _read_attention(fields, norm),
        "linear_attention": lambda: _read_delta_net(fields, norm, by_key_head),
    }
    if not isinstance(types, list) or len(types) != count or not all(kind in kinds for kind in types):
        raise fields.error(f"layer_types is {types!r}, {count} of {', '.join(kinds)} were expected", "layer_types")
    mixers = {kind: read() for kind, read in kinds.items()}
    return [mixers[kind] for kind in types]


def read_shared(fields: Fields) -> DenseMLP:
    """The shared expert.

    Args:
      fields: the config's.
    """
    width = fields.size("shared_expert_intermediate_size")
    return DenseMLP(width, read_activation(fields), "shared", "mlp.shared_expert")


def read_offset_norm(fields: Fields) -> Norm:
    """The norms, whose weights are offset by one, but for that of a delta-net's heads.

    Args:
      fields: the config's.
    """
    return read_norm(fields, 1e-6, offset=True)


def _read_attention(fields: Fields, norm: Norm) -> GQA:
    fields.size("head_dim")  # without it the classes have one of their own
    biases = "qkvo" if fields.flag("attention_bias", False) else ""
    return read_gqa(fields, rotary_factor=0.25, norm=norm, qk_norm="head", biases=biases, gate="q")


def _read_delta_net(fields: Fields, norm: Norm, by_key_head: bool) -> DeltaNet:
    heads, key_heads = fields.size("linear_num_value_heads"), fields.size("linear_num_key_heads")
    if heads % key_heads:
        raise fields.error(
            f"linear_num_value_heads is {heads}, no multiple of linear_num_key_heads {key_heads}",
            "linear_num_value_heads",
        )
    return DeltaNet(
        num_key_heads=key_heads,
        num_heads=heads,
        key_dim=fields.size("linear_key_head_dim"),
        value_dim=fields.size("linear_value_head_dim"),
        kernel=fields.size("linear_conv_kernel_dim"),
        by_key_head=by_key_head,
        norm=Norm(norm.eps),
    )
