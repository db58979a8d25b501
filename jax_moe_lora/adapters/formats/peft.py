"""PEFT adapter folders: 2-D modules, per-expert 2-D modules, and 3-D expert parameters.

Source of the conventions: peft 0.21, `tuners/lora/layer.py` (ParamWrapper) and `tuners/tuners_utils.py`.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.formats.peft_config import PeftConfig, read_peft_config
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site, uniform
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.safetensors_io import DTYPES, TensorInfo, open_tensors, tensor_infos

WEIGHTS = "adapter_model.safetensors"
# Up to this version PEFT read every 3-D parameter as (E, in, out), and wrote A and B with their roles exchanged.
LAST_TRANSPOSED = (0, 19, 0)
# One spelling a number: were 0 and 00 both taken, one key would silently replace the other.
_INDEX = r"0|[1-9][0-9]{0,8}"
_KEY = re.compile(
    rf"base_model\.model\.(?P<module>model\.layers\.(?P<layer>{_INDEX})\.(?P<path>.+))\.lora_(?P<side>[AB])\.weight"
)
_KNOWN_BAD = {
    "lora_magnitude_vector": "DoRA is not supported",
    "lora_embedding_": "adapters on embeddings are not supported",
    "lm_head": "adapters on the head are not supported",
    "embed_tokens": "adapters on embeddings are not supported",
    ".bias": "biases are not supported",
}


def read_peft(
    folder: str | Path, sites: Mapping[str, Site], names: AdapterNames, name: str | None = None
) -> LoRAAdapter:
    """Reads an adapter that PEFT wrote.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      sites, names: the model's projections, and where they stand in adapter files.

    Returns:
      The adapter in the file's dtype. Gate and up of a 3-D parameter hold the same array as their A.

    Raises:
      AdapterFormatError: a file that is missing or corrupt; a config field or a key that is not supported, not
      understood, not targeted by the config, or does not fit the model, by name.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    file = folder / WEIGHTS
    if not file.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterFormatError(
            f"{folder} holds adapter_model.bin, a pickle, which is never read; save it as safetensors."
        )
    pairs = _pair_keys(file, tensor_infos(file, AdapterFormatError))
    with open_tensors(file, AdapterFormatError) as tensors:
        reader = _Reader(file, config, sites, names, pairs, tensors)
        weights = reader.read()
    _check_targets(config, names, reader.used)
    return LoRAAdapter(name or folder.name, weights, config.raw)


Pair = dict[str, tuple[str, TensorInfo]]


def _pair_keys(file: Path, infos: Mapping[str, TensorInfo]) -> dict[tuple[int, str], Pair]:
    """(layer, path) -> side -> (key, info); every key is understood and has its other side."""
    pairs: dict[tuple[int, str], Pair] = {}
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
        if len(info.shape) != 2:
            raise AdapterFormatError(f"{file}: {key} has shape {list(info.shape)}; expected two dimensions.")
        pairs.setdefault((int(match["layer"]), match["path"]), {})[match["side"]] = (key, info)
    for pair in pairs.values():
        if len(pair) == 1:
            ((side, (key, _)),) = pair.items()
            raise AdapterFormatError(f"{file}: {key} stands without its lora_{'B' if side == 'A' else 'A'}.")
    if not pairs:
        raise AdapterFormatError(f"{file} holds no LoRA weights.")
    return pairs


class _Reader:
    """Turns one file's pairs into `LoRAWeights` by (layer, module)."""

    def __init__(
        self,
        file: Path,
        config: PeftConfig,
        sites: Mapping[str, Site],
        names: AdapterNames,
        pairs: Mapping[tuple[int, str], Pair],
        tensors: Any,
    ):
        self.file, self.config, self.sites, self.names = file, config, sites, names
        self.per_expert_path = names.per_expert_path or names.experts_path
        self.pairs, self.tensors = pairs, tensors
        self.used: set[str] = set()  # names of modules and parameters, as PEFT matches its targets

    def read(self) -> dict[tuple[int, str], LoRAWeights]:
        weights: dict[tuple[int, str], LoRAWeights] = {}
        experts: dict[tuple[int, str], dict[int, Pair]] = {}
        per_expert = re.compile(re.escape(self.per_expert_path) + rf"\.({_INDEX})\.([^.]+)")
        for (layer, path), pair in self.pairs.items():
            match = per_expert.fullmatch(path)
            if module := self.names.dense.get(path):
                if (layer, module) in weights:
                    raise self._error(pair["A"][0], f"the {module} projection stands under another name too")
                weights[layer, module] = self._dense(layer, path, pair)
            elif path == self.names.experts_path:
                weights |= self._outer(layer, pair)
            elif path == f"{self.names.experts_path}.base_layer":
                weights |= self._inner(layer, pair)
            elif match and match[2] in self.names.experts:
                experts.setdefault((layer, match[2]), {})[int(match[1])] = pair
            else:
                raise self._error(pair["A"][0], "the model has no such projection")
        for (layer, part), by_expert in experts.items():
            module = self.names.experts[part]
            if (layer, module) in weights:
                raise self._error(next(iter(by_expert.values()))["A"][0], "the experts stand as 3-D parameters too")
            weights[layer, module] = self._per_expert(layer, part, by_expert)
        return weights

    def _dense(self, layer: int, path: str, pair: Pair) -> LoRAWeights:
        module = self.names.dense[path]
        key = f"model.layers.{layer}.{path}"
        if self.config.targets_parameter(f"{key}.weight"):  # transformers 5 holds the router as a bare parameter
            key = f"{key}.weight"
        site = self._site(layer, module, pair)
        rank, scale = self._rank(key, pair, parameter=key.endswith(".weight"))
        a, b = self._load(pair, (rank, site.in_width), (site.out_width, rank))
        return uniform(a[None], b[None], scale, 1)

    def _per_expert(self, layer: int, part: str, by_expert: Mapping[int, Pair]) -> LoRAWeights:
        """Experts that the file leaves out keep rank 0: a zero update, and nobody is shifted into their place."""
        site = self._site(layer, self.names.experts[part], next(iter(by_expert.values())))
        count = site.num_experts
        ranks, scales = np.zeros(count, np.int32), np.zeros(count, np.float32)
        loaded = {}
        for expert, pair in by_expert.items():
            if expert >= count:
                raise self._error(pair["A"][0], f"the model has experts 0 to {count - 1}")
            rank, scale = self._rank(f"model.layers.{layer}.{self.per_expert_path}.{expert}.{part}", pair)
            loaded[expert] = self._load(pair, (rank, site.in_width), (site.out_width, rank))
            ranks[expert], scales[expert] = rank, scale
        largest = int(ranks.max())
        a = np.zeros((count, largest, site.in_width), _common(own_a.dtype for own_a, _ in loaded.values()))
        b = np.zeros((count, site.out_width, largest), _common(own_b.dtype for _, own_b in loaded.values()))
        for expert, (own_a, own_b) in loaded.items():
            a[expert, : ranks[expert]] = own_a
            b[expert, :, : ranks[expert]] = own_b
        return LoRAWeights(a, b, ranks, scales)

    def _outer(self, layer: int, pair: Pair) -> dict[tuple[int, str], LoRAWeights]:
        """The outer wrapper is `down_proj` where an inner one stands too; alone, the config says which it is."""
        prefix = f"model.layers.{layer}.{self.names.experts_path}"
        fused, down = (self.config.targets_parameter(f"{prefix}.{p}") for p in ("gate_up_proj", "down_proj"))
        if (layer, f"{self.names.experts_path}.base_layer") in self.pairs:
            return self._down(layer, pair)
        if fused == down:
            both = "both gate_up_proj and down_proj" if fused else "neither gate_up_proj nor down_proj"
            raise self._error(pair["A"][0], f"it stands alone, and target_parameters name {both} of this layer")
        return self._gate_up(layer, pair) if fused else self._down(layer, pair)

    def _inner(self, layer: int, pair: Pair) -> dict[tuple[int, str], LoRAWeights]:
        if (layer, self.names.experts_path) not in self.pairs:
            raise self._error(pair["A"][0], "an inner wrapper stands without its outer one")
        return self._gate_up(layer, pair)

    def _gate_up(self, layer: int, pair: Pair) -> dict[tuple[int, str], LoRAWeights]:
        site = self._site(layer, "gate", pair)
        a, b, scale = self._stacked(layer, "gate_up_proj", pair, site.in_width, 2 * site.out_width, site.num_experts)
        gate, up = b[:, : site.out_width], b[:, site.out_width :]
        halves = {"gate": gate, "up": up}
        return {(layer, module): uniform(a, half, scale, site.num_experts) for module, half in halves.items()}

    def _down(self, layer: int, pair: Pair) -> dict[tuple[int, str], LoRAWeights]:
        site = self._site(layer, "down", pair)
        a, b, scale = self._stacked(layer, "down_proj", pair, site.in_width, site.out_width, site.num_experts)
        return {(layer, "down"): uniform(a, b, scale, site.num_experts)}

    def _stacked(
        self, layer: int, parameter: str, pair: Pair, in_width: int, out_width: int, experts: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """A `[E, R, in]` and B `[E, out, R]` of a 3-D parameter: A is expert-major, B rank-major and expert-minor."""
        rows, columns = pair["A"][1].shape[0], pair["B"][1].shape[1]
        if rows % experts or columns != rows:
            raise self._error(
                pair["A"][0], f"A has {rows} rows and B {columns} columns, not one multiple of {experts} experts"
            )
        rank, scale = self._rank(
            f"model.layers.{layer}.{self.names.experts_path}.{parameter}", pair, rows // experts, True
        )
        self._check_orientation(pair, in_width, out_width)
        a, b = self._load(pair, (rows, in_width), (out_width, rows))
        return a.reshape(experts, rank, in_width), b.reshape(out_width, rank, experts).transpose(2, 0, 1), scale

    def _check_orientation(self, pair: Pair, in_width: int, out_width: int) -> None:
        (key, a), (_, b) = pair["A"], pair["B"]
        version = self.config.peft_version
        now, then = f"{in_width} to {out_width}", f"{out_width} to {in_width}"
        readings = f"as peft writes today it maps {now}, as up to 0.19.0 {then}"
        if in_width == out_width:
            if version is None:
                raise self._error(
                    key, f"shapes cannot tell its orientation and no released peft_version is given: {readings}"
                )
            transposed = version <= LAST_TRANSPOSED
        else:
            transposed = (a.shape[1], b.shape[0]) == (out_width, in_width)
        if transposed:
            raise self._error(
                key,
                "it has the transposed orientation of peft up to 0.19.0, not read yet; save it with a newer peft",
            )

    def _site(self, layer: int, module: str, pair: Pair) -> Site:
        site = self.sites.get(module)
        if site is None or layer not in site.layers:
            raise self._error(pair["A"][0], f"the model has no {module} projection in layer {layer}")
        return site

    def _rank(self, key: str, pair: Pair, found: int | None = None, parameter: bool = False) -> tuple[int, float]:
        """Rank and scale by the config, which must target the key and agree with the file."""
        if not (self.config.targets_parameter(key) if parameter else self.config.targets_module(key)):
            raise self._error(pair["A"][0], f"{self.config.file.name} does not target {key}")
        self.used.add(key)
        rank, scale = self.config.rank_and_scale(key)
        found = pair["A"][1].shape[0] if found is None else found
        if found != rank:
            raise self._error(pair["A"][0], f"it has rank {found}, and {self.config.file.name} says {rank}")
        return rank, scale

    def _load(self, pair: Pair, shape_a: tuple[int, int], shape_b: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        for (key, info), shape in ((pair["A"], shape_a), (pair["B"], shape_b)):
            if info.shape != shape:
                raise self._error(key, f"it has shape {list(info.shape)}, and the model expects {list(shape)}")
        return self.tensors.get_tensor(pair["A"][0]), self.tensors.get_tensor(pair["B"][0])

    def _error(self, key: str, problem: str) -> AdapterFormatError:
        return AdapterFormatError(f"{self.file}: {key}: {problem}.")


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that holds every value: the one that all have, else float32, which holds both half precisions."""
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype(np.float32)


def _check_targets(config: PeftConfig, names: AdapterNames, used: set[str]) -> None:
    """A projection of the model that the config lists and the file has nothing for is an error, not a zero."""
    own = {path.rpartition(".")[2] for path in names.dense} | set(names.experts)
    listed = [] if isinstance(config.target_modules, str) else list(config.target_modules)
    for target in [t for t in listed if t.rpartition(".")[2] in own] + list(config.target_parameters):
        if not any(key == target or key.endswith(f".{target}") for key in used):
            raise AdapterFormatError(f"{config.file} targets {target!r}, and {WEIGHTS} holds no weights for it.")
