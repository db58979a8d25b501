"""Gated delta-net, a linear attention: what it is made of. Its forward pass is `blocks/delta_net.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax_moe_lora.models.specs.parameter import RMS, Axis, Norm, Parameter, projection


@dataclass(frozen=True)
class DeltaNet:
    """Linear attention with a state per head that decays and is corrected by the delta rule (Qwen3-Next, Qwen3.5).

    Attributes:
      num_key_heads: heads of queries and keys.
      num_heads: heads of values, a multiple of `num_key_heads`; value head h belongs to key head `h // multiple`.
      key_dim: width of a query's or key's head.
      value_dim: width of a value's head.
      kernel: tokens that the causal convolution of queries, keys and values sees.
      by_key_head: two projections (`qkvz`, `ba`) hold the rows of one key head after the other (Qwen3-Next); else there
        are four, each with its heads side by side (Qwen3.5).
      norm: of what the heads give, before it is gated.
    """

    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    kernel: int = 4
    by_key_head: bool = False
    norm: Norm = RMS

    @property
    def keys(self) -> int:
        """Width of the queries, and of the keys."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of the values, and of the gate."""
        return self.num_heads * self.value_dim

    @property
    def convolved(self) -> int:
        """Width of what the convolution runs over: queries, keys and values."""
        return 2 * self.keys + self.values

    @property
    def shared_by(self) -> int:
        """Value heads of one key head."""
        return self.num_heads // self.num_key_heads

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        whole: tuple[Axis, ...] = ("whole_heads",)  # `qkv` holds all queries, then all keys, then all values
        widths = {"qkv": self.convolved, "z": self.values, "b": self.num_heads, "a": self.num_heads}
        if self.by_key_head:
            widths = {"qkvz": self.convolved + self.values, "ba": 2 * self.num_heads}
        rows = [
            projection(f"delta_{part}", width, hidden_size, f"linear_attn.in_proj_{part}", ("whole_heads", "embed"))
            for part, width in widths.items()
        ]
        return [
            *rows,
            projection("delta_out", hidden_size, self.values, "linear_attn.out_proj", ("embed", "whole_heads")),
            Parameter(
                "delta_conv",
                (self.convolved, 1, self.kernel),
                ("linear_attn.conv1d.weight",),
                ("whole_heads", "scalar", "scalar"),
            ),
            # What a state forgets is a product over all tokens: its exponents are not rounded.
            Parameter("delta_decay", (self.num_heads,), ("linear_attn.A_log",), whole, "zeros", float32=True),
            Parameter("delta_step", (self.num_heads,), ("linear_attn.dt_bias",), whole, "ones", float32=True),
            *self.norm.parameters("delta_norm", self.value_dim, "linear_attn.norm"),
        ]
