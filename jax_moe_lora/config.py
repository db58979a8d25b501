"""Static, hashable configs: what a checkpoint's `config.json` says, in the library's own words."""

from dataclasses import dataclass, field
from typing import Literal

from pallas_kernels.constants import Activation

RouterKind = Literal["softmax_topk", "topk_softmax", "sigmoid_bias"]


@dataclass(frozen=True)
class MoEConfig:
    """One Mixture-of-Experts layer. Letters are those of the README's glossary.

    Attributes:
      hidden_size: D, width of a token row.
      expert_width: F, width inside an expert.
      num_experts: E, routed experts.
      top_k: K, experts per token.
      router: `softmax_topk` takes the softmax over all E scores, then the K largest; `topk_softmax` takes the K
        largest scores, then the softmax over these; `sigmoid_bias` scores by sigmoid and adds a bias for the choice
        alone (DeepSeek-V3).
      renormalize: divide the K weights by their sum (`norm_topk_prob`).
      scaling: factor on the K weights, after renormalising (`routed_scaling_factor`).
      activation: of the gated unit, `activation(gate) * up`; `clamped_swiglu` is gpt-oss's, which clamps both factors.
      expert_bias: the experts' projections have biases.
    """

    hidden_size: int
    expert_width: int
    num_experts: int
    top_k: int
    router: RouterKind = "softmax_topk"
    renormalize: bool = False
    scaling: float = 1.0
    activation: Activation = "silu"
    expert_bias: bool = False


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and, where a checkpoint extends its context, how frequencies scale.

    `kind` is transformers' `rope_type`. Fields that a kind does not use keep their defaults.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer whose MLPs are routed experts, or dense in some layers.

    Attributes:
      model_type: the family's name in `config.json`, such as `qwen3_moe`.
      vocab_size: V. num_layers: L. hidden_size: D.
      num_heads, num_kv_heads, head_dim: attention's query heads, key/value heads and width of a head.
      mlp_width: inner width of the dense MLPs (unused where every layer is routed).
      moe: the routed layers' config; moe_layers: for each layer, whether its MLP is routed.
      shared_expert_width: inner width of the expert that every token of a routed layer goes through, beside the routed
        ones and weighted by a sigmoid gate (Qwen2-MoE); 0 where there is none.
      qk_norm: RMSNorm on q and k, over each head or over the whole projection (OLMoE).
      attention_biases: the projections that have a bias.
      clip_qkv: largest absolute value of q, k and v, cut off after their norms.
      tie_embeddings: the head is the transposed embedding.
      eos_token_ids: generation stops at any of these.
    """

    model_type: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    moe: MoEConfig
    moe_layers: tuple[bool, ...]
    rope: RopeConfig = field(default_factory=RopeConfig)
    rms_eps: float = 1e-6
    shared_expert_width: int = 0
    qk_norm: Literal["head", "projection"] | None = "head"
    attention_biases: Literal["", "qkv", "qkvo"] = ""
    clip_qkv: float | None = None
    tie_embeddings: bool = False
    max_positions: int = 32_768
    eos_token_ids: tuple[int, ...] = ()
