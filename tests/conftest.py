"""Strict defaults for the whole suite: no silent promotion, shapes checked at run time, float32 as float32."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NPROC", "16")  # the GPU interpreter needs a thread for each warpgroup; read when jax starts

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Parameter trees are left out: they also hold shapes, shardings and numpy arrays.
KERNELS = [
    "activations",
    "backend",
    "dispatch",
    "grouped_lora",
    "grouped_matmul",
    "hopper",
    "lora_steps",
    "pages",
    "plan",
    "portable",
    "routed_experts.api",
    "routed_experts.projections",
    "xla",
]
CHECKED = [
    "layer.moe",
    "layer.linear",
    "layer.routing",
    "layer.nn",
    "serving.programs",
    "adapters.bank",
    "adapters.extraction",
    "models.attention",
    "models.cache",
    "models.decoder",
    "models.layer",
    "models.rope",
]
_hooked = [f"pallas_kernels.{name}" for name in KERNELS] + [f"jax_moe_lora.{name}" for name in CHECKED]
_hook = install_import_hook(_hooked, "beartype.beartype")
