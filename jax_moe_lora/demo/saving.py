"""Saves the demo's adapters as PEFT does, with transformers 5 or as with transformers 4. Needs torch and PEFT."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

NAME = "jax-moe-lora-demo"
# What PEFT 0.15 saves for an adapter that uses none of these features.
_UNSET = ["auto_mapping", "corda_config", "eva_config", "exclude_modules", "layer_replication", "layers_pattern"]
_UNSET += ["layers_to_transform", "megatron_config", "modules_to_save", "revision", "trainable_token_indices"]
PEFT_015_DEFAULTS = dict.fromkeys(_UNSET) | {
    **dict.fromkeys(["fan_in_fan_out", "lora_bias", "use_dora", "use_rslora"], False),
    **{key: {} for key in ("alpha_pattern", "loftq_config", "rank_pattern")},
    "base_model_name_or_path": NAME,
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "megatron_core": "megatron.core",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
}


def rewrite_json(path: Path, change: Callable[[dict], dict]) -> None:
    """Replaces the JSON object in `path` by the result of `change`, with sorted keys."""
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")


def tidy_config(config: dict) -> dict:
    """PEFT's saved config without local paths, and with its sets sorted."""
    lists = {key: sorted(value) for key, value in config.items() if key.startswith("target_") and value}
    return config | lists | {"base_model_name_or_path": NAME}


def split_experts(weights: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """PEFT's 3-D expert adapter as a pair of matrices per expert and projection; other keys are kept.

    In the 3-D file, ranks vary fastest in `lora_A` [experts * rank, in], and experts vary fastest in `lora_B`
    [out, rank * experts]. Gate and up share `lora_A`, which is written twice; the rows of gate come first in `lora_B`.
    Nothing is rounded.

    Args:
      weights: the tensors of PEFT's file, by key.
      experts: the number of experts.
    """
    split: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        prefix, separator, rest = key.partition(".mlp.experts.")
        if not separator:
            split[key] = weight
            continue
        side = rest.removeprefix("base_layer.")
        projections = ["gate_proj", "up_proj"] if rest.startswith("base_layer.") else ["down_proj"]
        if side.startswith("lora_A"):
            per_expert = weight.reshape(experts, -1, weight.shape[1])
            parts = [per_expert] * len(projections)
        else:
            per_expert = weight.reshape(weight.shape[0], -1, experts).permute(2, 0, 1)
            parts = list(per_expert.chunk(len(projections), dim=1))
        for projection, part in zip(projections, parts, strict=True):
            for expert in range(experts):
                split[f"{prefix}.mlp.experts.{expert}.{projection}.{side}"] = part[expert].clone().contiguous()
    return split


def save_adapter(model: peft.PeftModel, folder: Path, per_expert_config: dict | None = None) -> None:
    """Saves the adapter of `model` as PEFT does.

    Args:
      model: the base model with one adapter.
      folder: where to.
      per_expert_config: fields of the config with which PEFT and transformers 4 would have saved it, one pair of
        matrices per expert and projection; None saves the 3-D form.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(Path(scratch, file), folder / file)
    rewrite_json(folder / "adapter_config.json", tidy_config)
    if per_expert_config is not None:
        weights = split_experts(load_file(folder / "adapter_model.safetensors"), model.config.num_experts)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        rewrite_json(folder / "adapter_config.json", lambda _: PEFT_015_DEFAULTS | per_expert_config)
