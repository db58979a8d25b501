"""What is inside: folders on disk, routing, adapters and differences, each as plain data or numpy arrays."""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from jax_moe_lora.inspect.adapters import delta_norm, effective_rank, singular_values, spectra
    from jax_moe_lora.inspect.folders import (
        AdapterSummary,
        ModelSummary,
        ModuleSummary,
        inspect_adapter,
        inspect_folder,
        inspect_model,
    )
    from jax_moe_lora.inspect.routing import changed_experts, coactivation, divergence, entropy, expert_load
    from jax_moe_lora.inspect.trace import Trace, router_trace
    from jax_moe_lora.parity.difference import Difference, difference

__all__ = [
    "AdapterSummary",
    "Difference",
    "ModelSummary",
    "ModuleSummary",
    "Trace",
    "changed_experts",
    "coactivation",
    "delta_norm",
    "difference",
    "divergence",
    "effective_rank",
    "entropy",
    "expert_load",
    "inspect_adapter",
    "inspect_folder",
    "inspect_model",
    "router_trace",
    "singular_values",
    "spectra",
]
