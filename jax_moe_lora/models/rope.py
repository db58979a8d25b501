"""Rotary position embedding, with the frequency scalings that checkpoints use."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """`(float32 [turned pairs] radians a position, factor on cos and sin)`.

    Source: `modeling_rope_utils.py` of transformers; YaRN is arXiv:2309.00071.
    """
    dim = head_dim if config.kind == "proportional" else config.rotary_dim or head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    base = 1.0 / np.float32(config.theta) ** exponents
    if config.kind == "linear":
        return base / np.float32(config.factor), 1.0
    if config.kind == "longrope":
        assert config.attention_factor is not None
        return base / np.asarray(config.divisors, np.float32), config.attention_factor
    if config.kind == "proportional":
        turned = np.arange(dim // 2) < (config.rotary_dim or dim) // 2
        return np.where(turned, base / np.float32(config.factor), 0).astype(np.float32), 1.0
    if config.kind == "llama3":
        return _llama3(config, base), 1.0
    if config.kind == "yarn":
        return _yarn(config, base, dim)
    return base, 1.0


def cosines_and_sines(
    positions: Int[Array, "B T"], config: RopeConfig, head_dim: int
) -> tuple[Float[Array, "B T pairs"], Float[Array, "B T pairs"]]:
    """Of the angle of each turned pair of a head's dimensions, in float32, with the config's factor on both."""
    inverse, factor = frequencies(config, head_dim)
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(inverse)[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Float[Array, "B T H hd"], positions: Int[Array, "B T"], config: RopeConfig) -> Float[Array, "B T H hd"]:
    """Turns pairs of a head's dimensions by their position's angle; float32 inside, x's dtype outside."""
    cos, sin = (part[:, :, None] for part in cosines_and_sines(positions, config, x.shape[-1]))
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width].astype(jnp.float32), x[..., width:]
    if config.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape) if config.interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate((turned.astype(x.dtype), rest), axis=-1)


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
