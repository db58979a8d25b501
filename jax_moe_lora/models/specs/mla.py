"""Multi-head latent attention: what it is made of. Its forward pass is `blocks/mla.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.specs.parameter import RMS, Norm, Parameter, bias, projection


@dataclass(frozen=True)
class MLA:
    """Attention whose keys and values are made of one latent a token (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
      num_heads: H, of queries, keys and values.
      nope_dim: n, width of the part of a head's queries and keys that has no position.
      rope_dim: r, width of the part that the rotary embedding turns; all heads share one such key.
      value_dim: v, width of a head's values.
      kv_rank: C, width of the latent that keys and values are made of.
      q_rank: width of the latent that queries are made of; None where they are made of the hidden row itself.
      rope: rotary embedding.
      interleaved: it turns neighbours (2i, 2i + 1), as published checkpoints have them; else (i, i + r/2).
      scale: factor on the scores, YaRN's included; None for `(n + r) ** -0.5`.
      norm: of the latents.
      biases: `q_a`, `kv_a_with_mqa` and `o` have biases.
      query_growth: `(beta, L)`: the query at position p is multiplied by `1 + beta * ln(1 + floor(p / L))` (Mistral 4);
        None for no such factor.
    """

    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    kv_rank: int
    q_rank: int | None
    rope: RopeConfig
    interleaved: bool = True
    scale: float | None = None
    norm: Norm = RMS
    biases: bool = False
    query_growth: tuple[float, int] | None = None

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """Its rows of the layer's table.

        Args:
          hidden_size: D.
        """
        d, rank, latent = hidden_size, self.q_rank, self.kv_rank
        queries = self.num_heads * (self.nope_dim + self.rope_dim)
        expanded = self.num_heads * (self.nope_dim + self.value_dim)
        if rank is None:
            rows = [projection("q", queries, d, "self_attn.q_proj", ("heads", "embed"))]
        else:
            rows = [
                projection("q_a", rank, d, "self_attn.q_a_proj", ("latent", "embed")),
                *self.norm.parameters("q_a_norm", rank, "self_attn.q_a_layernorm"),
                projection("q_b", queries, rank, "self_attn.q_b_proj", ("heads", "latent")),
            ]
        compressed = latent + self.rope_dim
        rows += [
            projection("kv_a_with_mqa", compressed, d, "self_attn.kv_a_proj_with_mqa", ("latent", "embed")),
            *self.norm.parameters("kv_a_norm", latent, "self_attn.kv_a_layernorm"),
            projection("kv_b", expanded, latent, "self_attn.kv_b_proj", ("heads", "latent")),
            projection("o", d, self.num_heads * self.value_dim, "self_attn.o_proj", ("embed", "heads")),
        ]
        biased = {"q_a", "kv_a_with_mqa", "o"} if self.biases else ()
        rows += [
            bias(f"{row.name}_bias", row.shape[0], row.modules[0], row.axes[0]) for row in rows if row.name in biased
        ]
        return rows
