"""One adapter's open file: its keys as pairs of A and B, checked against its config and the model's sites."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from jax_moe_lora.adapters.formats.names import TEXT, AdapterNames, plain_key, with_prefix
from jax_moe_lora.adapters.formats.peft_config import PeftConfig
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.lora import LoRAWeights, Site
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.safetensors_header import TensorInfo

DENSE_ONLY = "PEFT, no experts"
# One spelling per number: if 0 and 00 were both accepted, one key would silently replace the other.
INDEX = r"0|[1-9][0-9]{0,8}"
_KEY = re.compile(
    rf"base_model\.model\.(?P<module>model\.layers\.(?P<layer>{INDEX})\.(?P<path>.+))\.lora_(?P<side>[AB])\.weight"
)
# PEFT looks an embedding's A up, and names its sides otherwise.
OUTER_KEY = re.compile(
    r"base_model\.model\.(?P<path>lm_head|model\.unembed_tokens(?=\.lora_[AB]\.)|model\.embed_tokens(?=\.lora_embedding))"
    r"\.(?:lora_embedding_(?P<lookup>[AB])|lora_(?P<side>[AB])\.weight)"
)
TOKENS_KEY = re.compile(
    r"base_model\.model\.(?P<path>model\.embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta"
)
"""Rows that replace some of the base model's (`trained_tokens.py`)."""
OUTSIDE = -1
"""The layer of pairs that stand outside of the layers, in a file; the model's sites say which one it is to it."""
_KNOWN_BAD = {
    ".visual.": "the vision tower is not served, nor are adapters on it; train the language model's modules alone",
    "lora_magnitude_vector": "DoRA is not supported",
    ".bias": "biases are not supported",
    "token_adapter": "expected base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
    "lora_embedding_": "expected base_model.model.model.embed_tokens.lora_embedding_A",
    "lm_head": "expected base_model.model.lm_head.lora_A.weight",
    "unembed_tokens": "expected base_model.model.model.unembed_tokens.lora_A.weight",
    "embed_tokens": "expected base_model.model.model.embed_tokens.lora_embedding_A",
}
# What to do about a projection that the model lacks or has in other sizes.
ANOTHER_MODEL = "; if the adapter was trained for another model, load it into that one"

Weights = dict[tuple[int, str], LoRAWeights]


@dataclass(frozen=True)
class Pair:
    """A and B of one path below `model.layers.L.`.

    Attributes:
      layer: the L of its keys.
      path: what stands between `model.layers.L.` and `.lora_A`.
      keys: side -> key in the file.
      infos: side -> what the file's header says of it.
    """

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
class FileLayout:
    """One way of laying out the experts.

    Attributes:
      name: what users are told.
      rest: what follows the experts' path in its keys.
      read: makes the weights of all its pairs in a file.
    """

    name: str
    rest: re.Pattern[str]
    read: Callable[["AdapterFile", Sequence[Pair]], Weights]


def pair_keys(file: Path, infos: Mapping[str, TensorInfo], problems: Problems) -> list[Pair]:
    """The pairs of a file; every key is understood and has its other side.

    Args:
      file: what errors call it.
      infos: key -> what the header says.
      problems: what becomes of a problem.

    Raises:
      AdapterFormatError: a key that is not understood or stands alone, or a dtype that is not read, by name.
    """
    pairs: dict[tuple[int, str], dict[str, str]] = {}
    for key, info in infos.items():
        with problems:
            plain = plain_key(key)
            match, outer = _KEY.fullmatch(plain), OUTER_KEY.fullmatch(plain)
            where: tuple[int, str] | None = None  # rows of tokens are no pair
            if TOKENS_KEY.fullmatch(plain):
                side = ""
            elif outer is not None:
                where, side = (OUTSIDE, outer["path"]), outer["lookup"] or outer["side"]
            elif match is not None:
                where, side = (int(match["layer"]), match["path"]), match["side"]
            else:
                expected = "base_model.model.model.layers.L.….lora_A.weight"
                why = next((why for part, why in _KNOWN_BAD.items() if part in key), f"expected {expected}")
                raise _refusal(file, key, f"the key {key} is not understood: {why}.", "this key", expected)
            if where is not None:
                pairs.setdefault(where, {})[side] = key
            if info.dtype not in DTYPES:
                expected = f"one of {', '.join(DTYPES)}"
                raise _refusal(file, key, f"{key} has dtype {info.dtype}; expected {expected}.", info.dtype, expected)
    for keys in pairs.values():
        with problems:
            if len(keys) == 1:
                ((side, key),) = keys.items()
                other = f"lora_{'B' if side == 'A' else 'A'}"
                raise _refusal(file, key, f"{key} stands without its {other}.", "one side", f"its {other} too")
    with problems:
        if not infos:
            raise _refusal(file, "", f"{file.name} holds no LoRA weights.", "no tensors", "an A and a B at least")
    return [
        Pair(layer, path, keys, {side: infos[key] for side, key in keys.items()})
        for (layer, path), keys in pairs.items()
        if len(keys) == 2 and all(infos[key].dtype in DTYPES for key in keys.values())
    ]


class Tensors(Protocol):
    """Where a reader gets its matrices."""

    def get_tensor(self, name: str, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Headers:
    """Matrices of which only the shape is known: one zero each, repeated without taking memory."""

    infos: Mapping[str, TensorInfo]

    def get_tensor(self, name: str) -> np.ndarray:
        return _stand_in(self.infos[name].shape, DTYPES[self.infos[name].dtype])


@dataclass
class AdapterFile:
    """What the readers of all layouts share.

    Attributes:
      path: what errors call the weights.
      config: the adapter's config.
      sites: the model's projections.
      names: where they stand in adapter files.
      tensors: where matrices are read.
      problems: what becomes of a problem.
      values: whether matrices are read; if not, only their shapes are known, and nothing may depend on what they hold.
      b_layout: the order of the columns of a 3-D parameter's B, where the user named it; None leaves it to the config.
      layout: what users are told of the experts.
      prefix: what the names of the text model's modules begin with in this file.
      used: names of modules and parameters that weights were found for, as PEFT matches its targets.
      keys: a key of each projection, for errors.
    """

    path: Path
    config: PeftConfig
    sites: Mapping[str, Site]
    names: AdapterNames
    tensors: Tensors
    problems: Problems
    values: bool = True
    b_layout: str | None = None
    layout: str = DENSE_ONLY
    prefix: str = TEXT
    used: set[str] = field(default_factory=set)
    keys: dict[tuple[int, str], str] = field(default_factory=dict)

    def site(self, pair: Pair, *modules: str) -> Site:
        """The site of the modules that the pair updates, which are of one form."""
        for module in modules:
            self.keys.setdefault((pair.layer, module), pair.key)
        site = self.sites.get(modules[0])
        if site is None or pair.layer not in site.layers:
            problem = f"the model has no {modules[0]} projection in layer {pair.layer}{ANOTHER_MODEL}"
            raise self.error(pair, problem, pair.path, "a projection of the model")
        return site

    def dense_module(self, pair: Pair) -> str:
        """The projection that a path means in the pair's layer."""
        modules = self.names.modules(pair.path)
        here = (module for module in modules if module in self.sites and pair.layer in self.sites[module].layers)
        return next(here, modules[0])

    def outer_site(self, pair: Pair, module: str) -> Site:
        """The site of a module outside of the layers.

        Raises:
          AdapterFormatError: it is none of the sites.
        """
        if module not in self.sites:
            problem = f"adapters on the {module} are not supported here"
            raise self.error(pair, problem, pair.path, f"one of {', '.join(self.sites)}")
        self.keys.setdefault((self.sites[module].layers[0], module), pair.key)
        return self.sites[module]

    def scale(self, pair: Pair, rank: int, targeted: Callable[[str], bool], *names: str) -> float:
        """The scale by the config, which must target one of the names and agree with the tensors' rank.

        Args:
          pair: A and B.
          rank: the tensors' own.
          targeted: whether the config targets a full name.
          names: names of the module below `model.layers.L.` (in full where it is outside), that of the file first.
        """
        config, full = self.config, [self.full_name(pair, name) for name in names]
        with self.problems:
            if config.says_targets and not any(map(targeted, full)):
                raise self.error(pair, f"{config.file.name} does not target {full[0]}", full[0], "a target")
        self.used.update(full)
        expected, scale = config.rank_and_scale(*full)
        with self.problems:
            if config.says_ranks and rank != expected:
                problem = f"it has rank {rank}, and {config.file.name} says {expected}"
                raise self.error(pair, problem, f"rank {rank}", f"rank {expected}")
        return scale

    def full_name(self, pair: Pair, path: str) -> str:
        """The name, in the model that PEFT wrapped, of a path below the pair's layer, or outside of the layers."""
        return with_prefix(path if pair.layer == OUTSIDE else f"{TEXT}layers.{pair.layer}.{path}", self.prefix)

    def load(
        self, pair: Pair, shapes_a: Sequence[tuple[int, ...]], shapes_b: Sequence[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A and B of a pair.

        Args:
          pair: their keys.
          shapes_a: what A's shape may be.
          shapes_b: what B's shape may be.
        """
        return self._load(pair, "A", shapes_a), self._load(pair, "B", shapes_b)

    def _load(self, pair: Pair, side: str, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
        shape, key = pair.shape(side), pair.keys[side]
        with self.problems:
            if shape not in shapes:
                expected = " or ".join(str(list(shape)) for shape in shapes)
                problem = f"{key}: it has shape {list(shape)}, and the model expects {expected}{ANOTHER_MODEL}."
                raise _refusal(self.path, key, problem, list(shape), expected)
            return self.tensors.get_tensor(key)
        return _stand_in(shapes[0], np.dtype(np.float32))

    def blank(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Zeros to put matrices into; where values are not read, they take no memory.

        Args:
          shape: theirs.
          dtype: theirs.
        """
        return np.zeros(shape, dtype) if self.values else _stand_in(shape, dtype)

    def two_dimensional(self, pair: Pair) -> bool:
        for side in "AB":
            with self.problems:
                if len(shape := pair.shape(side)) != 2:
                    key = pair.keys[side]
                    problem = f"{key} has shape {list(shape)}; expected two dimensions."
                    raise _refusal(self.path, key, problem, list(shape), "two dimensions")
        return len(pair.shape("A")) == len(pair.shape("B")) == 2

    def duplicate(self, pair: Pair, module: str) -> AdapterFormatError:
        problem = f"it holds {module} of layer {pair.layer}, which another key holds too"
        return self.error(pair, problem, f"{module} twice", "one key for each projection")

    @property
    def present(self) -> set[str]:
        """Names that weights were found for, or that keys whose problems were kept may have been meant for."""
        keys = [plain_key(str(error.key)) for error in self.problems.found]
        matches = [match for key in keys if (match := _KEY.fullmatch(key) or OUTER_KEY.fullmatch(key))]
        modules = {(match.groupdict().get("module") or match["path"]).removesuffix(".base_layer") for match in matches}
        refused = {with_prefix(module, self.prefix) for module in modules}
        ends = ("", ".gate_up_proj", ".down_proj", ".weight")
        return self.used | {f"{module}{end}" for module in refused for end in ends}

    def error(self, pair: Pair, problem: str, found: object = "", expected: str = "") -> AdapterFormatError:
        return _refusal(self.path, pair.key, f"{pair.key}: {problem}.", found, expected)


def _refusal(file: Path, key: str, problem: str, found: object, expected: str) -> AdapterFormatError:
    return AdapterFormatError(f"{file}: {problem}", file=file, key=key, found=found, expected=expected)


def _stand_in(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)
