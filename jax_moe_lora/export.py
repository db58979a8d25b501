"""A decode step as a file that runs without this library: `from jax_moe_lora.export import export_decode`."""

from jax_moe_lora.serving.export import Step, decode_arguments, export_decode

__all__ = ["Step", "decode_arguments", "export_decode"]
