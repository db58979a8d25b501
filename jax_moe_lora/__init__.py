"""Mixture-of-Experts with many LoRA adapters in one batch, in JAX.

Names are imported when they are first used: reading a config or an adapter does not import jax.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from jax_moe_lora import adapters, config, errors, export, inspect, nn, parity, plots, training  # noqa: F401
    from jax_moe_lora.adapters.bank import AdapterBank, create_bank, remove
    from jax_moe_lora.adapters.extraction import extract
    from jax_moe_lora.adapters.insertion import insert
    from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site
    from jax_moe_lora.adapters.pool import AdapterInfo, AdapterPool, AdapterStatus
    from jax_moe_lora.adapters.validation.finding import Finding
    from jax_moe_lora.adapters.writing import write_adapter
    from jax_moe_lora.config import MoEConfig, RopeConfig
    from jax_moe_lora.errors import (
        AdapterFormatError,
        AdapterInUseError,
        AdapterNameError,
        BankFullError,
        CheckpointError,
        ConfigError,
        DeviceError,
        InputError,
        JaxMoELoRAError,
        ProcessError,
    )
    from jax_moe_lora.layer.linear import lora_linear
    from jax_moe_lora.layer.moe import moe_lora, routed_experts
    from jax_moe_lora.models.specs.model import ModelConfig
    from jax_moe_lora.serving.answers import Generation, StreamedToken, TokenLogprob
    from jax_moe_lora.serving.functional import Functional
    from jax_moe_lora.serving.model import Model
    from jax_moe_lora.serving.sampling_params import SamplingParams
    from jax_moe_lora.tools.compilations import count_compilations
    from jax_moe_lora.tools.merge import merge_adapter
    from jax_moe_lora.tools.quantise import quantise_checkpoint
    from jax_moe_lora.tools.read import read_adapter
    from jax_moe_lora.tools.validate import validate, validate_config
    from pallas_kernels.ops import BASE_SLOT
    from pallas_kernels.routed_experts.weights import ExpertWeights

__all__ = [
    "BASE_SLOT",
    "AdapterBank",
    "AdapterFormatError",
    "AdapterInUseError",
    "AdapterInfo",
    "AdapterNameError",
    "AdapterPool",
    "AdapterStatus",
    "BankFullError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "ExpertWeights",
    "Finding",
    "Functional",
    "Generation",
    "InputError",
    "JaxMoELoRAError",
    "LoRAAdapter",
    "LoRAWeights",
    "MoEConfig",
    "Model",
    "ModelConfig",
    "ProcessError",
    "RopeConfig",
    "SamplingParams",
    "Site",
    "StreamedToken",
    "TokenLogprob",
    "count_compilations",
    "create_bank",
    "extract",
    "insert",
    "lora_linear",
    "merge_adapter",
    "moe_lora",
    "quantise_checkpoint",
    "read_adapter",
    "remove",
    "routed_experts",
    "validate",
    "validate_config",
    "write_adapter",
]
