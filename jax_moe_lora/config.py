"""Static, hashable configs: what a checkpoint's `config.json` says, in the library's own words."""

from dataclasses import dataclass
from typing import Literal

from pallas_kernels.constants import Activation

RouterKind = Literal["softmax_topk", "topk_softmax", "sigmoid_bias", "softmax_bias", "sparsemixer"]
CHOICE_BIAS: tuple[RouterKind, ...] = ("sigmoid_bias", "softmax_bias")
"""Routers whose bias is for the choice of experts alone."""
GroupScore = Literal["max", "top2_sum"]


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
        alone (DeepSeek-V3); `softmax_bias` does so over the softmax of all E scores (Ernie 4.5); `sparsemixer` takes
        the two largest scores, each weighted by a softmax over those that are hardly smaller (Phi-3.5-MoE).
      renormalize: divide the K weights by their sum (`norm_topk_prob`).
      renormalize_eps: added to that sum, so that weights which are all zero stay zero (DeepSeek-V3's 1e-20).
      renormalize_floor: the least that this sum counts as.
      jitter: of `sparsemixer`: scores count that are smaller than the largest by at most `2 * jitter` of their size.
      scaling: factor on the K weights, after renormalising (`routed_scaling_factor`).
      num_groups: the experts form so many groups of neighbours, each of the same size (`n_group`).
      top_groups: a token chooses among the experts of its so many best groups (`topk_group`).
      group_score: what groups are compared by: their best expert (`max`, DeepSeek-V2), or the sum of their two best
        (`top2_sum`, DeepSeek-V3), the bias for the choice included.
      activation: of the gated unit, `activation(gate) * up`; `clamped_swiglu` is gpt-oss's, which clamps both factors.
      expert_bias: the experts' projections have biases.
    """

    hidden_size: int
    expert_width: int
    num_experts: int
    top_k: int
    router: RouterKind = "softmax_topk"
    renormalize: bool = False
    renormalize_eps: float = 0.0
    renormalize_floor: float = 0.0
    jitter: float = 0.01
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"
    activation: Activation = "silu"
    expert_bias: bool = False


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta` and, where a checkpoint extends its context, how frequencies scale.

    `kind` is transformers' `rope_type`. Fields that a kind does not use keep their defaults.

    `rotary_dim` is how many dimensions of a head are turned, None for all of them: the first ones, as if the head had
    no others; with `proportional` (Gemma 4) those of the fastest frequencies of the whole head. Dimension i is turned
    together with the one half of them further on; where `interleaved`, with its neighbour (Ernie 4.5). `divisors` are
    of each pair's frequency (`longrope`).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "yarn", "llama3", "longrope", "proportional"] = "default"
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
    rotary_dim: int | None = None
    interleaved: bool = False
    divisors: tuple[float, ...] = ()
