"""One adapter's open file: its keys as pairs of A and B, checked against its config and the model's sites."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.formats.peft_config import PeftConfig
from jax_moe_lora.adapters.lora import LoRAWeights, Site
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.safetensors_io import DTYPES, TensorInfo

WEIGHTS = "adapter_model.safetensors"
# One spelling a number: were 0 and 00 both taken, one key would silently replace the other.
INDEX = r"0|[1-9][0-9]{0,8}"
_KEY = re.compile(
    rf"base_model\.model\.(?P<module>model\.layers\.(?P<layer>{INDEX})\.(?P<path>.+))\.lora_(?P<side>[AB])\.weight"
)
_KNOWN_BAD = {
    "lora_magnitude_vector": "DoRA is not supported",
    "lora_embedding_": "adapters on embeddings are not supported",
    "lm_head": "adapters on the head are not supported",
    "unembed_tokens": "adapters on the head are not supported",
    "embed_tokens": "adapters on embeddings are not supported",
    ".bias": "biases are not supported",
}

Weights = dict[tuple[int, str], LoRAWeights]


@dataclass(frozen=True)
class Pair:
    """A and B of one path below `model.layers.L.`, by key and header."""

    layer: int
    path: str
    keys: Mapping[str, str]
    infos: Mapping[str, TensorInfo]

    @property
    def key(self) -> str:
        """The key that errors name."""
        return self.keys["A"]

    def shape(self, side: str) -> tuple[int, ...]:
        return self.infos[side].shape


@dataclass(frozen=True)
class Layout:
    """One way of laying out the experts.

    Attributes:
      name: what users are told.
      rest: what follows the experts' path in its keys. read: the weights of all its pairs in a file.
    """

    name: str
    rest: re.Pattern[str]
    read: Callable[["AdapterFile", Sequence[Pair]], Weights]


def pair_keys(file: Path, infos: Mapping[str, TensorInfo]) -> list[Pair]:
    """The pairs of a file; every key is understood and has its other side.

    Raises:
      AdapterFormatError: a key that is not understood or stands alone, or a dtype that is not read, by name.
    """
    found: dict[tuple[int, str], dict[str, str]] = {}
    for key, info in infos.items():
        match = _KEY.fullmatch(key)
        if match is None:
            why = next(
                (why for part, why in _KNOWN_BAD.items() if part in key),
                "expected base_model.model.model.layers.L.….lora_A.weight",
            )
            raise AdapterFormatError(f"{file}: the key {key} is not understood: {why}.")
        if info.dtype not in DTYPES:
            raise AdapterFormatError(f"{file}: {key} has dtype {info.dtype}; expected one of {', '.join(DTYPES)}.")
        found.setdefault((int(match["layer"]), match["path"]), {})[match["side"]] = key
    for keys in found.values():
        if len(keys) == 1:
            ((side, key),) = keys.items()
            raise AdapterFormatError(f"{file}: {key} stands without its lora_{'B' if side == 'A' else 'A'}.")
    if not found:
        raise AdapterFormatError(f"{file} holds no LoRA weights.")
    return [
        Pair(layer, path, keys, {side: infos[key] for side, key in keys.items()})
        for (layer, path), keys in found.items()
    ]


@dataclass
class AdapterFile:
    """What the readers of all layouts share.

    Attributes:
      layout: what users are told of the experts. used: names of modules and parameters that weights were found for, as
        PEFT matches its targets.
    """

    path: Path
    config: PeftConfig
    sites: Mapping[str, Site]
    names: AdapterNames
    tensors: Any
    layout: str
    used: set[str] = field(default_factory=set)

    def site(self, module: str, pair: Pair) -> Site:
        site = self.sites.get(module)
        if site is None or pair.layer not in site.layers:
            raise self.error(pair, f"the model has no {module} projection in layer {pair.layer}")
        return site

    def scale(self, pair: Pair, rank: int, targeted: Callable[[str], bool], *names: str) -> float:
        """The scale by the config, which must target one of the names and agree with the tensors' rank.

        Args:
          names: below `model.layers.L.`, that of the file first.
        """
        full = [f"model.layers.{pair.layer}.{name}" for name in names]
        if not any(map(targeted, full)):
            raise self.error(pair, f"{self.config.file.name} does not target {full[0]}")
        self.used.update(full)
        expected, scale = self.config.rank_and_scale(*full)
        if rank != expected:
            raise self.error(pair, f"it has rank {rank}, and {self.config.file.name} says {expected}")
        return scale

    def load(
        self, pair: Pair, shapes_a: Sequence[tuple[int, ...]], shapes_b: Sequence[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A and B, each of one of the shapes that the model expects."""
        for side, shapes in (("A", shapes_a), ("B", shapes_b)):
            if pair.shape(side) not in shapes:
                expected = " or ".join(str(list(shape)) for shape in shapes)
                raise AdapterFormatError(
                    f"{self.path}: {pair.keys[side]}: it has shape {list(pair.shape(side))}, "
                    f"and the model expects {expected}."
                )
        return self.tensors.get_tensor(pair.keys["A"]), self.tensors.get_tensor(pair.keys["B"])

    def two_dimensional(self, pair: Pair) -> None:
        for side in "AB":
            if len(pair.shape(side)) != 2:
                raise AdapterFormatError(
                    f"{self.path}: {pair.keys[side]} has shape {list(pair.shape(side))}; expected two dimensions."
                )

    def error(self, pair: Pair, problem: str) -> AdapterFormatError:
        return AdapterFormatError(f"{self.path}: {pair.key}: {problem}.")
