"""Grouped-query attention: what it is made of. Its forward pass is `blocks/gqa.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.specs.parameter import RMS, Axis, Norm, Parameter, bias, projection


@dataclass(frozen=True)
class GQA:
    """Attention whose query heads share key/value heads.

    Attributes:
      num_heads: H.
      num_kv_heads: G, a divisor of H.
      head_dim: hd.
      rope: rotary embedding; None for a layer without positions.
      norm: of q and k, where they have one.
      qk_norm: over each head, or over the whole projection (OLMoE); None for none.
      qk_norm_last: the norms come after the rotary embedding (Hunyuan), not before it.
      biases: the projections that have a bias.
      clip: largest absolute value of q, k and v, cut off after their norms.
      window: a token sees itself and the `window - 1` tokens before it; None for all of them.
      sinks: each head has a logit of its own in the softmax that no value belongs to (gpt-oss).
      gate: the result is multiplied by a sigmoid: of the second half of each head of q (`q`, Qwen3-Next), or of a
        projection of its own (`projection`, AFMoE).
      scale: factor on the scores; None for `hd ** -0.5`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    norm: Norm = RMS
    qk_norm: Literal["head", "projection"] | None = None
    qk_norm_last: bool = False
    biases: Literal["", "qkv", "qkvo"] = ""
    clip: float | None = None
    window: int | None = None
    sinks: bool = False
    gate: Literal["q", "projection"] | None = None
    scale: float | None = None

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        d, queries, keys = hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        heads, kv_heads = self.head_axes
        wide = 2 * queries if self.gate == "q" else queries
        rows = [
            projection("q", wide, d, "self_attn.q_proj", (heads, "embed")),
            projection("k", keys, d, "self_attn.k_proj", (kv_heads, "embed")),
            projection("v", keys, d, "self_attn.v_proj", (kv_heads, "embed")),
            projection("o", d, queries, "self_attn.o_proj", ("embed", heads)),
        ]
        if self.gate == "projection":
            rows.append(projection("attention_gate", queries, d, "self_attn.gate_proj", (heads, "embed")))
        by_name = {row.name: row for row in rows}
        for module in self.biases:
            (width, _), (axis, _) = by_name[module].shape, by_name[module].axes
            rows.append(bias(f"{module}_bias", width, f"self_attn.{module}_proj", axis))
        for module in "qk" if self.qk_norm else "":
            width = self.head_dim if self.qk_norm == "head" else by_name[module].shape[0]
            rows += self.norm.parameters(f"{module}_norm", width, f"self_attn.{module}_norm")
        if self.sinks:
            rows.append(Parameter("sinks", (self.num_heads,), ("self_attn.sinks",), (heads,)))
        return rows

    @property
    def head_axes(self) -> tuple[Axis, Axis]:
        """The logical axes of all query heads and of all key/value heads; a norm over all of them keeps them whole."""
        if self.qk_norm == "projection":
            return "whole_heads", "whole_heads"
        return "heads", "kv_heads" if self.num_kv_heads > 1 else "whole_heads"  # a single one belongs to all queries

    @property
    def cache_axes(self) -> tuple[Axis | None, ...]:
        """The logical axes of each array of the cache, behind the batch's."""
        return None, self.head_axes[1], None
