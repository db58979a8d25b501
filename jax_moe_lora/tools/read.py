"""An adapter on the host, read for a model that need not be loaded."""

from pathlib import Path
from typing import Any

from jax_moe_lora.adapters.formats import detect
from jax_moe_lora.adapters.formats.base_checkpoint import BaseCheckpoint
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.models.specs.model import ModelConfig


def read_adapter(
    folder: str | Path, model: Any, *, name: str | None = None, lora_b_layout: str | None = None
) -> LoRAAdapter:
    """Reads an adapter in any layout that `load_adapter` takes, as arrays of numpy; of the model its config is enough.

    Args:
      folder: the adapter's folder, or a hub id.
      model: what it belongs to: a folder or hub id, of which the config is read, a `ModelConfig`, or a `Model`.
      name: of the adapter; the folder's if None.
      lora_b_layout: `rank_major` or `grouped_by_expert`, the order of the columns of a 3-D parameter's B, for files of
        Unsloth that do not say it. None does as the config says, and else as PEFT writes them: `rank_major`.

    Returns:
      The adapter, in the file's dtype: `adapter.weights[layer, module]` has `a`, `b`, `ranks`, `scale` and `delta`.

    Raises:
      AdapterFormatError: the files are not understood or do not fit the model, by file and key.
      ConfigError: the model's config is not read.
      InputError: an argument is invalid.
    """
    config = model_config(model)
    names = adapter_names(config)
    base_folder = local_folder(model) if isinstance(model, str | Path) else getattr(model, "folder", None)
    base = BaseCheckpoint.at(base_folder, config.tie_embeddings)
    return detect.read_adapter(
        local_folder(folder), adapter_sites(config), names, name, base=base, b_layout=lora_b_layout
    )


def model_config(model: Any) -> ModelConfig:
    """The config of what a caller calls a model.

    Args:
      model: a folder or hub id, a `ModelConfig`, or a `Model`.

    Raises:
      InputError: something else.
      ConfigError: a folder's config is not read.
    """
    if isinstance(model, str | Path):
        return read_model_config(local_folder(model))
    config = getattr(model, "config", model)
    if not isinstance(config, ModelConfig):
        kind = type(model).__name__
        raise InputError(f"model is of type {kind}; give a model's folder or hub id, a ModelConfig, or a Model.")
    return config
