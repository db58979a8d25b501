"""Rotary position embedding, with the frequency scalings that checkpoints use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """`(float32 [head_dim / 2] radians a position, factor on cos and sin)`.

    Source: `modeling_rope_utils.py` of transformers; YaRN is arXiv:2309.00071.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = 1.0 / np.float32(config.theta) ** exponents
    if config.kind == "linear":
        return base / np.float32(config.factor), 1.0
    if config.kind == "llama3":
        return _llama3(config, base), 1.0
    if config.kind == "yarn":
        return _yarn(config, base, head_dim)
    return base, 1.0


def rotate(x: Float[Array, "B T H hd"], positions: Int[Array, "B T"], config: RopeConfig) -> Float[Array, "B T H hd"]:
    """Turns each pair (i, i + w/2) of a head's first w columns by its position's angle; w is `rotary_dim`, or hd.

    Float32 inside, x's dtype outside.
    """
    width = config.rotary_dim or x.shape[-1]
    if width < x.shape[-1]:
        turned = rotate(x[..., :width], positions, config)
        return jnp.concatenate((turned, x[..., width:]), axis=-1)
    inverse, factor = frequencies(config, width)
    angles = positions.astype(jnp.float32)[:, :, None, None] * jnp.asarray(inverse)[None, None, None, :]
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


def _llama3(config: RopeConfig, base: np.ndarray) -> np.ndarray:
    assert config.original_max_positions is not None
    wavelength = 2 * math.pi / base
    smooth = (config.original_max_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    mixed = (1 - smooth) * base / config.factor + smooth * base
    low = config.original_max_positions / config.low_freq_factor
    high = config.original_max_positions / config.high_freq_factor
    return np.where(wavelength > low, base / config.factor, np.where(wavelength < high, base, mixed)).astype(np.float32)


def _yarn(config: RopeConfig, base: np.ndarray, head_dim: int) -> tuple[np.ndarray, float]:
    original = config.original_max_positions
    assert original is not None

    def correction_dim(rotations: float) -> float:
        span = original / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(config.theta))

    low, high = correction_dim(config.beta_fast), correction_dim(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    scaled = base / np.float32(config.factor) * ramp + base * (1 - ramp)
    return scaled.astype(np.float32), _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)
