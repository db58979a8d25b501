"""Whether a file holds weights for what its config targets."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile, FileLayout
from jax_moe_lora.adapters.formats.names import OUTER_PATHS, AdapterNames, with_prefix
from jax_moe_lora.adapters.formats.patterns import suffixes
from jax_moe_lora.adapters.formats.peft import PER_EXPERT
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.errors import AdapterFormatError


def check_targets(file: AdapterFile, layout: FileLayout | None, stacks: Collection[FileLayout]) -> None:
    """Refuses a target that the model has, in the form that the file is in, and that the file has nothing for.

    A listed name that no module of the model has in this form could never match: `gate_proj` where experts are 3-D
    parameters. PEFT passes over it, and so does this.

    Args:
      file: what has been read of it.
      layout: of its experts; None where it has nothing for them.
      stacks: the layouts that hold all experts in one tensor.
    """
    config = file.config
    listed = [] if isinstance(config.target_modules, str) else config.target_modules
    if not listed and not config.target_parameters:
        return
    names = [*dense_modules(file.names, file.sites), *joined_modules(file.names, file.sites)]
    names += outer_modules(file.sites)
    if layout is PER_EXPERT:
        names += expert_modules(file.names, file.sites)
    elif layout in stacks:
        names += _stacked_modules(file.names, file.sites)
    names = [with_prefix(name, file.prefix) for name in names]
    possible = ends(name for name in names if config.targets_module(name))
    present = ends(file.present if file.problems.found else file.used)
    # PEFT itself writes `gate.weight` for a router of another name (Hunyuan's `gate.wg`): no module could match it.
    routers = ends(f"{name}.weight" for name in dense_modules(file.names, file.sites))
    parameters = [t for t in config.target_parameters if t != "gate.weight" or t in routers]
    for target in [t for t in listed if t in possible] + parameters:
        with file.problems:
            if target not in present:
                why = f"{config.file} targets {target!r}, and {file.path.name} holds no weights for it."
                raise AdapterFormatError(why, file=config.file, key=target, found="no weights", expected="an A and a B")


def ends(names: Iterable[str]) -> set[str]:
    """Everything that a target may be called to match one of these full names."""
    return {suffix for name in names for suffix in suffixes(name)}


def dense_modules(names: AdapterNames, sites: Mapping[str, Site]) -> Iterator[str]:
    """Full names of the model's projections with one matrix.

    Args:
      names: where projections stand in adapter files.
      sites: the model's projections.
    """
    for path, module in names.dense_modules():
        for layer in sites[module].layers if module in sites else ():
            yield f"model.layers.{layer}.{path}"


def joined_modules(names: AdapterNames, sites: Mapping[str, Site]) -> Iterator[str]:
    """Full names of the projections that are one in published code and several here.

    Args:
      names: where projections stand in adapter files.
      sites: the model's projections.
    """
    for path, modules in names.joined.items():
        for layer in sites[modules[0]].layers if all(module in sites for module in modules) else ():
            yield f"model.layers.{layer}.{path}"


def outer_modules(sites: Mapping[str, Site]) -> list[str]:
    """Full names of the projections outside of the layers."""
    return [path for path, module in OUTER_PATHS.items() if module in sites]


def expert_modules(names: AdapterNames, sites: Mapping[str, Site]) -> Iterator[str]:
    """Full names of the experts' projections where each is a module of its own, as with transformers 4.

    Args:
      names: where projections stand in adapter files.
      sites: the model's projections.
    """
    experts = names.per_expert_path or names.experts_path
    for part, module in names.experts.items():
        for layer in sites[module].layers if module in sites else ():
            for expert in range(sites[module].num_experts):
                yield f"model.layers.{layer}.{experts}.{expert}.{part}"


def parameters(names: AdapterNames, sites: Mapping[str, Site]) -> Iterator[str]:
    """Full names of the parameters that a config may target: 3-D ones of all experts, and weights of dense modules.

    Args:
      names: where projections stand in adapter files.
      sites: the model's projections.
    """
    for parameter, module in (("gate_up_proj", "gate"), ("down_proj", "down")):
        for layer in sites[module].layers if module in sites else ():
            yield f"model.layers.{layer}.{names.experts_path}.{parameter}"
    for name in dense_modules(names, sites):
        yield f"{name}.weight"


def _stacked_modules(names: AdapterNames, sites: Mapping[str, Site]) -> Iterator[str]:
    """Every name that a server's config may have for a projection of all experts."""
    for module in names.experts.values():
        for layer in sites[module].layers if module in sites else ():
            for spelling in names.spellings(module):
                yield f"model.layers.{layer}.{names.experts_path}.{spelling}"
