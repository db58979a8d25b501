"""What training starts from: new params, or those of adapters that are read and compared with their recipes."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.adapters import Params, init_params
from jax_moe_lora.training.layout import Placements
from jax_moe_lora.training.spec import AdapterSpec

Start = str | Path | LoRAAdapter
"""An adapter's folder or hub id, or an adapter in memory."""


def read_starts(starts: Mapping[str, Start], config: ModelConfig) -> dict[str, LoRAAdapter]:
    """The adapters that training starts from, in memory.

    Args:
      starts: adapter -> what it starts from.
      config: the model's.

    Raises:
      AdapterFormatError: an adapter's files are not understood, or do not fit the model.
    """
    sites, names = layer_sites(config), adapter_names(config)
    return {
        name: start if isinstance(start, LoRAAdapter) else read_adapter(local_folder(start), sites, names, name)
        for name, start in starts.items()
    }


def check_same(name: str, asked: AdapterSpec, start: AdapterSpec, sites: Mapping[str, Site]) -> None:
    """Compares what a recipe asks for with the adapter that training starts from.

    Args:
      name: the adapter's, for errors.
      asked: the recipe's spec.
      start: the spec of the adapter that training starts from.
      sites: the model's.

    Raises:
      InputError: the matrices or scales differ; it names the fields of both.
    """
    differences = []
    if {*asked.targets} != {*start.targets}:
        differences.append(("targets", ", ".join(start.targets), ", ".join(asked.targets)))
    for module in (module for module in start.targets if module in asked.targets):
        if start.rank_of(module) != asked.rank_of(module):
            differences.append((f"rank of {module}", str(start.rank_of(module)), str(asked.rank_of(module))))
        elif not math.isclose(start.scale_of(module), asked.scale_of(module), rel_tol=1e-6):
            differences.append((f"scale of {module}", f"{start.scale_of(module):g}", f"{asked.scale_of(module):g}"))
    if not differences and start.shapes(sites) != asked.shapes(sites):
        differences.append(("layout", start.layout, asked.layout))
    if differences:
        said = "; ".join(f"{field} is {was} there and {now} in the recipe" for field, was, now in differences)
        raise InputError(
            f"Adapter {name!r} cannot start from the adapter that from_adapter gives: {said}. Give the recipe the "
            "same, or none of rank, alpha, layout and targets: then they are taken from there."
        )


def first_params(
    specs: Mapping[str, AdapterSpec],
    sites: Mapping[str, Site],
    seed: int,
    starts: Mapping[str, Params],
    placements: Placements | None = None,
) -> dict[str, Params]:
    """The params before the first step; those of a new adapter follow from the seed and its name alone.

    Args:
      specs: adapter -> what it trains.
      sites: the model's.
      seed: of new adapters.
      starts: adapter -> its params, for those that are not new.
      placements: on a mesh, where they are put, one adapter after the other.
    """
    key = jax.random.key(seed)
    keys = {name: jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode()))) for name in specs}

    def make(name: str, spec: AdapterSpec) -> Params:
        params = starts[name] if name in starts else init_params(spec, sites, keys[name])
        return params if placements is None else jax.device_put(params, placements[name])

    return {name: make(name, spec) for name, spec in specs.items()}
