"""What a family of models is: how its configs are read, and the names that its files have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax_moe_lora.models.specs.model import ModelConfig

ReadConfig = Callable[[Mapping[str, Any], Mapping[str, Any] | None, str], ModelConfig]
"""`read_config(config.json, generation_config.json or None, what errors call the file)`."""


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
      model_type: in `config.json`; for a family with a vision wrapper that of its text part.
      read_config: reads a config as published on the hub, or as transformers 5 writes it.
      wrappers: the `model_type` of multimodal configs whose `text_config` is one of this family.
      paths: parameter -> the paths of its tensor below a layer, where they are not the block's own (`Parameter.paths`).
      experts_path: module of the routed experts in transformers 5; fused 3-D parameters stand below it.
      per_expert_path: the experts' path in checkpoints with a tensor per expert; `experts_path` where None.
      stacks: `gate_up_proj`, `down_proj` (and `gate_up_proj_bias`, ...) -> other paths of these fused tensors below a
        layer, such as Granite's `block_sparse_moe.input_linear.weight`.
      joined: path below a layer of a tensor in published checkpoints -> the parameters whose rows it holds, in order,
        such as Sarvam's `attention.query_key_value.weight`. In transformers 5 each is a module of its own;
        adapters may be on either.
      interleaved: rows of the fused `gate_up_proj` alternate between gate and up; else all of gate come first.
      stored_in_out: fused 3-D parameters are `[E, in, out]`.
      prefixes: what may stand in checkpoints in place of `model.`, for the text part of a wrapper.
      renames: regular expression of what tensor names in checkpoints begin with -> what stands there in one of the text
        model alone. The first one that matches counts.
      unused: regular expression of tensor names -> what they are; they may stand in a checkpoint and are not read.
      prediction_layers: layers behind the last one may stand in a checkpoint: they predict further tokens (MTP).
      refuses: what its configs may say and is refused, for the list of families.
    """

    model_type: str
    read_config: ReadConfig
    wrappers: tuple[str, ...] = ()
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts_path: str = "mlp.experts"
    per_expert_path: str | None = None
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: bool = False
    stored_in_out: bool = False
    prefixes: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    prediction_layers: bool = False
    refuses: str = ""
