"""Where projections stand in adapter files: a family's names, and the names that servers give to experts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

# Stacks of all experts, one tensor a side: the last part of their path -> the modules that they hold.
TINKER_PARTS = {"w1": ("gate",), "w3": ("up",), "w2": ("down",)}
SGLANG_PARTS = {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}
# Not what the names suggest: h_to_4h is the projection with the activation, `gate` the linear one.
TRTLLM_PARTS = {"moe_h_to_4h": ("gate",), "moe_gate": ("up",), "moe_4h_to_h": ("down",), "moe_router": ("router",)}

# Paths of the projections that stand outside of the layers; the first of a module is PEFT's, the other one Tinker's.
OUTER_PATHS = {"model.embed_tokens": "embedding", "lm_head": "head", "model.unembed_tokens": "head"}

BEGIN = "base_model.model."
"""What every key begins with."""
TEXT = "model."
"""What the names of a text model's modules begin with, but for its head's."""
WRAPPED = ("model.language_model.", "language_model.model.")
"""What stands in place of it in multimodal models."""


def without_prefix(name: str, prefixes: Iterable[str]) -> str:
    """The name that a module or tensor of a multimodal model has in its text model alone.

    Args:
      name: the full one.
      prefixes: what may stand in place of `model.`, such as `model.language_model.`, or `language_model.model.`, behind
        whose first part the head stands too.
    """
    for prefix in prefixes:
        if name.startswith(prefix):
            return TEXT + name.removeprefix(prefix)
        if prefix.endswith(f".{TEXT}") and name.startswith(around := prefix.removesuffix(TEXT)):
            return name.removeprefix(around)
    return name


def with_prefix(name: str, prefix: str) -> str:
    """The opposite of `without_prefix`.

    Args:
      name: in a text model alone.
      prefix: what stands in place of `model.`.
    """
    if name.startswith(TEXT):
        return prefix + name.removeprefix(TEXT)
    return f"{prefix.removesuffix(TEXT)}{name}" if prefix.endswith(f".{TEXT}") else name


def any_prefix(name: str) -> list[str]:
    """What a module or tensor of a text model may be called, alone and in a multimodal model.

    Args:
      name: in a text model alone.
    """
    return [with_prefix(name, prefix) for prefix in (TEXT, *WRAPPED)]


def plain_key(key: str) -> str:
    """The key that an adapter of the text model alone has.

    Args:
      key: in a file.
    """
    return BEGIN + without_prefix(key.removeprefix(BEGIN), WRAPPED) if key.startswith(BEGIN) else key


@dataclass(frozen=True)
class AdapterNames:
    """Paths below `model.layers.L.` and the modules that they mean.

    Attributes:
      dense: path -> module, for projections with one matrix (the router among them). A module may have two paths, of
        which the last is the one in checkpoints.
      experts: last part of an expert's path -> module, as in `mlp.experts.E.gate_proj`.
      experts_path: path of the experts; their fused 3-D parameters are `gate_up_proj` and `down_proj` below it.
      per_expert_path: path of the experts where each has its own 2-D matrices; `experts_path` where None.
      interleaved: rows of `gate_up_proj` alternate between gate and up; else all of gate come first.
      stored_in_out: 3-D parameters are `(E, in, out)`, which PEFT never wrote transposed.
      prefixes: what the names of the text model's modules begin with; the first where adapters are written.
      variants: path -> further modules that it means in layers where the one of `dense` is not: projections of other
        widths there (Gemma 4).
      joined: path -> the modules whose rows a single projection of published code holds, in order (Ling's
        `attention.query_key_value`); an adapter on it has one A for all of them.
    """

    dense: Mapping[str, str]
    experts: Mapping[str, str]
    experts_path: str
    per_expert_path: str | None = None
    interleaved: bool = False
    stored_in_out: bool = False
    prefixes: tuple[str, ...] = (TEXT,)
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def modules(self, path: str) -> tuple[str, ...]:
        """The modules that a path of `dense` means; which one it is depends on the layer."""
        return (self.dense[path], *self.variants.get(path, ()))

    def dense_modules(self) -> Iterator[tuple[str, str]]:
        """(path, module) of all projections with one matrix."""
        for path in self.dense:
            for module in self.modules(path):
                yield path, module

    def split(self, path: str) -> tuple[str, str] | None:
        """The experts' path and what follows it; None for a path outside of the experts."""
        for experts in (self.experts_path, self.per_expert_path or self.experts_path):
            if path == experts or path.startswith(f"{experts}."):
                return experts, path[len(experts) :]
        return None

    def gate_and_up(self, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The halves `[E, F, R]` of a fused B `[E, 2F, R]`, as views."""
        half = b.shape[1] // 2
        return (b[:, ::2], b[:, 1::2]) if self.interleaved else (b[:, :half], b[:, half:])

    def fuse_gate_and_up(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """The fused B of two halves.

        Args:
          gate: `[E, F, R]`.
          up: `[E, F, R]`.

        Returns:
          `[E, 2F, R]`.
        """
        if not self.interleaved:
            return np.concatenate((gate, up), axis=1)
        return np.stack((gate, up), axis=2).reshape(gate.shape[0], -1, gate.shape[2])

    def dense_path(self, module: str, in_checkpoints: bool = False) -> str:
        """The path of a projection with one matrix.

        Args:
          module: the projection.
          in_checkpoints: the path in checkpoints, not the first that it has.

        Returns:
          The path below `model.layers.L.`, or in full for one that stands outside of the layers.
        """
        paths = [path for path, named in self.dense_modules() if named == module]
        if not paths:
            return next(path for path, named in OUTER_PATHS.items() if named == module)
        return paths[-1 if in_checkpoints else 0]

    def spellings(self, module: str) -> tuple[str, ...]:
        """Every last part of a path that names this module of the experts."""
        family_parts = {part: (module,) for part, module in self.experts.items()}
        parts = family_parts | TINKER_PARTS | SGLANG_PARTS | TRTLLM_PARTS
        return tuple(part for part, modules in parts.items() if module in modules)
