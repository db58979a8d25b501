"""Rotary embedding fields of a config, in the spellings of the hub and of transformers 5."""

from typing import Any

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.fields import Fields

_KINDS = ("default", "linear", "yarn", "llama3")
# Sections of a head for the axes of an image; the positions of text are the same in all of them.
_OF_IMAGES = ("mrope_section", "mrope_interleaved")


def read_rope(
    fields: Fields,
    max_positions: int,
    default_theta: float,
    *,
    head_dim: int | None = None,
    default_factor: float = 1.0,
) -> RopeConfig:
    """Reads `rope_theta` with `rope_scaling` (hub), or `rope_parameters` (transformers 5).

    Args:
      fields: the config's.
      max_positions: the longest request.
      default_theta: the family's base, for a config that says none.
      head_dim: of a family that turns a part of each head (`partial_rotary_factor`); None for one that turns all of it.
      default_factor: that part, for a config that says none.

    Raises:
      ConfigError: a scaling that is not supported, or one without a parameter that it needs.
    """
    theta = fields.get("rope_theta")
    scaling, parameters = fields.get("rope_scaling"), fields.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise fields.error("rope_scaling and rope_parameters differ, and readers disagree on which one holds")
    raw = {**(_object(fields, "rope_scaling", scaling)), **(_object(fields, "rope_parameters", parameters))}
    inner = Fields(raw, fields.source + ", rope", any_value=_OF_IMAGES)
    kind = inner.get("rope_type", inner.get("type", "default"))
    inner.get("type")
    if kind not in _KINDS:
        raise fields.error(f"rope scaling {kind!r} is not supported, supported are {', '.join(_KINDS)}")
    if inner.get("type") not in (None, kind):
        raise inner.error(f"type is {inner.get('type')!r}, but rope_type is {kind!r}")
    base = inner.number("rope_theta", default_theta if theta is None else theta)
    if theta is not None and base != theta:
        raise inner.error(f"rope_theta is {base}, but {theta!r} beside it")
    if base <= 1:
        raise inner.error(f"rope_theta is {base}, more than 1 was expected")
    rotary_dim = None
    if head_dim is not None:
        rotary_dim = read_rotary_dim(inner, head_dim, fields.number("partial_rotary_factor", default_factor))
    scaled = _scaling(inner, kind, max_positions)
    inner.refuse_unknown()
    return RopeConfig(theta=base, kind=kind, rotary_dim=rotary_dim, **scaled)


def read_rotary_dim(fields: Fields, head_dim: int, default_factor: float) -> int | None:
    """How many of a head's dimensions are turned; None for all of them.

    Args:
      fields: where `partial_rotary_factor` stands.
      head_dim: hd.
      default_factor: where it does not.

    Raises:
      ConfigError: the part has no even number from 2 to hd.
    """
    part = fields.number("partial_rotary_factor", default_factor)
    turned = int(head_dim * part)
    if not 0 < turned <= head_dim or turned % 2:
        problem = f"{part:g}, which turns {turned} of a head's {head_dim} dimensions; an even number was expected"
        raise fields.error(f"partial_rotary_factor is {problem}", "partial_rotary_factor")
    return None if turned == head_dim else turned


def _scaling(inner: Fields, kind: str, max_positions: int) -> dict[str, Any]:
    """What `RopeConfig` has of a scaling, by its kind."""
    if kind == "default":
        inner.get("factor")
        return {}
    original = inner.optional_size("original_max_position_embeddings")
    factor = inner.number("factor")
    if factor < 1:
        raise inner.error(f"factor is {factor}, at least 1 was expected")
    scaled: dict[str, Any] = {"factor": factor, "original_max_positions": original or max_positions}
    if kind == "yarn":
        betas = {"beta_fast": inner.number("beta_fast", 32.0), "beta_slow": inner.number("beta_slow", 1.0)}
        if min(betas.values()) <= 0:
            raise inner.error(f"beta_fast and beta_slow are {list(betas.values())}, positive numbers were expected")
        scaled |= betas | {"truncate": inner.flag("truncate", True)}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            scaled[name] = None if inner.get(name) is None else inner.number(name)
    if kind == "llama3":
        bounds = {name: inner.number(name) for name in ("low_freq_factor", "high_freq_factor")}
        if not 0 < bounds["low_freq_factor"] < bounds["high_freq_factor"]:
            raise inner.error(
                f"low_freq_factor and high_freq_factor are {list(bounds.values())}, 0 < low < high was expected"
            )
        scaled |= bounds
    return scaled


def _object(fields: Fields, name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise fields.error(f"{name} is {value!r}, an object was expected")
    return value or {}
