"""The layer beside a plain torch reference: `table` compares every kind of adapter in every dtype.

Needs torch (the `parity` extra), which is imported when the reference is called.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from jax_moe_lora.parity.adapters import expand_shared, for_reference, per_expert_adapter, shared_adapter
    from jax_moe_lora.parity.compare import TOLERANCE, Comparison, LayerInputs, random_inputs, table
    from jax_moe_lora.parity.probe import Probe, probes
    from jax_moe_lora.parity.reference import torch_delta, torch_reference

__all__ = [
    "TOLERANCE",
    "Comparison",
    "LayerInputs",
    "Probe",
    "expand_shared",
    "for_reference",
    "per_expert_adapter",
    "probes",
    "random_inputs",
    "shared_adapter",
    "table",
    "torch_delta",
    "torch_reference",
]
