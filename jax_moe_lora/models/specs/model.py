"""A decoder as a list of layers, each a static spec of its blocks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.quantised.settings import Quantisation
from jax_moe_lora.models.specs.delta_net import DeltaNet
from jax_moe_lora.models.specs.gemma4 import Gemma4Attention, Gemma4Layer
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.parameter import RMS, Norm, Parameter

Attention = GQA | MLA | DeltaNet | Gemma4Attention
"""What mixes the tokens of a request."""
MLP = DenseMLP | RoutedMLP
"""What each token goes through on its own."""


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention, then an MLP, each with norms and a residual. Equal layers share one trace.

    Attributes:
      attention: its attention.
      mlp: its MLP.
      norm: of both blocks.
      norms: where the norms stand: on what goes into a block (`before`), on what comes out of it (`after`), or `both`.
      residual_scale: factor on what comes out of a block, before it is added.
    """

    attention: Attention
    mlp: MLP
    norm: Norm = RMS
    norms: Literal["before", "after", "both"] = "before"
    residual_scale: float = 1.0

    def parameters(self, hidden_size: int) -> Sequence[Parameter]:
        """The layer's table, with the paths that most families have.

        Args:
          hidden_size: D.
        """
        paths = {
            "before": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
            "after": {
                "attention_post_norm": "post_attention_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            },
            "both": {
                "attention_norm": "input_layernorm",
                "attention_post_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_post_norm": "post_feedforward_layernorm",
            },
        }[self.norms]
        norms = [row for name, path in paths.items() for row in self.norm.parameters(name, hidden_size, path)]
        return [*norms, *self.attention.parameters(hidden_size), *self.mlp.parameters(hidden_size)]


Layer = LayerSpec | Gemma4Layer
"""A decoder layer, arranged as most are or in a way of its own."""


def sizes_of_attention(layer: Layer) -> Any:
    """What says the heads of a layer's attention: its spec, or that inside of Gemma 4's."""
    return getattr(layer.attention, "heads", layer.attention)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with routed experts.

    Attributes:
      model_type: the family's name in `config.json`, such as `qwen3_moe`.
      vocab_size: V.
      hidden_size: D.
      layers: the spec of each layer.
      norm: the last one, before the head.
      embedding_scale: factor on the embeddings.
      logit_scale: factor on the logits.
      logit_softcap: c in `c * tanh(logits / c)`, applied last; None for none.
      tie_embeddings: the head is the transposed embedding.
      head_bias: the head has a bias.
      max_positions: the longest request that the checkpoint was made for.
      eos_token_ids: generation stops at any of these.
      wrapped: the checkpoint is that of a multimodal model, of which this is the text part.
      quantisation: how the checkpoint's matrices are quantised; None where they are not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm = RMS
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    head_bias: bool = False
    max_positions: int = 32_768
    eos_token_ids: tuple[int, ...] = ()
    wrapped: bool = False
    quantisation: Quantisation | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @cached_property
    def kinds(self) -> Mapping[Layer, int]:
        """Each different layer, in order, with the number of its kind."""
        return Counter(self.layers)

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with routed experts."""
        return tuple(index for index, layer in enumerate(self.layers) if isinstance(layer.mlp, RoutedMLP))

    @property
    def moe(self) -> MoEConfig:
        """The routed layers' config, which is the same in all of them."""
        return next(layer.mlp.moe for layer in self.layers if isinstance(layer.mlp, RoutedMLP))


@lru_cache(maxsize=512)
def layer_parameters(layer: Layer, hidden_size: int) -> tuple[Parameter, ...]:
    """The table of a layer, made once for all layers of its kind.

    Args:
      layer: its spec.
      hidden_size: D.
    """
    return tuple(layer.parameters(hidden_size))
