"""The time of one step on a mesh, layer by layer, and whether it fits: a prediction, not a measurement."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from jax.sharding import AbstractMesh

from jax_moe_lora.adapters.lora import EXPERT_MODULES, Site
from jax_moe_lora.errors import InputError
from jax_moe_lora.mesh.rules import AXES, DATA_AXIS, TENSOR_AXIS, check_mesh, parse_mesh, parts, split_sites
from jax_moe_lora.mesh.scaling.costs import ITEMSIZE, Step, Work, attention_work, pages_work, weights_work
from jax_moe_lora.mesh.scaling.hardware import CLUSTERS, Cluster, Device
from jax_moe_lora.mesh.scaling.memory import Memory, memory_of
from jax_moe_lora.mesh.scaling.sums import Sum, check_reach, layer_sums, seconds
from jax_moe_lora.mesh.scaling.workload import Workload
from jax_moe_lora.models.sites import select_sites
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import Layer, ModelConfig, sizes_of_attention

KERNEL_WIDTH = 64  # the kernels take expert widths that are multiples of it


@dataclass(frozen=True)
class LayerCost:
    """Layers of one kind, or what stands outside of the layers.

    Attributes:
      name: of the kind.
      count: layers of this kind.
      read: bytes that the busiest device reads, in each.
      multiplied: multiplications of that device, in each.
      sums: the collectives of each.
      device_s: seconds of the device, in each.
      sums_s: seconds of the collectives, in each.
    """

    name: str
    count: int
    read: float
    multiplied: float
    sums: tuple[Sum, ...]
    device_s: float
    sums_s: float

    @property
    def summed_bytes(self) -> int:
        """Bytes of the arrays that are summed, in each."""
        return sum(one.nbytes for one in self.sums)


@dataclass(frozen=True)
class Prediction:
    """A step on a mesh.

    Attributes:
      mesh: axis -> size.
      layers: the cost of each kind of layer, and of the head.
      memory: of each device.
      device: its limits.
      tokens: that the step reads or makes, all devices together.
      notes: what the mesh does not do well.
    """

    mesh: dict[str, int]
    layers: tuple[LayerCost, ...]
    memory: Memory
    device: Device
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def sums_s(self) -> float:
        """Seconds of all collectives."""
        return sum(layer.count * layer.sums_s for layer in self.layers)

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return self.sums_s + sum(layer.count * layer.device_s for layer in self.layers)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of such steps."""
        return self.tokens / self.step_s

    @property
    def room(self) -> float:
        """Bytes of a device that weights, pages and cache may take."""
        return self.device.room * self.device.memory

    @property
    def fits(self) -> bool:
        """Whether a device has room for what it holds."""
        return self.memory.total <= self.room

    @property
    def mesh_text(self) -> str:
        """The mesh as `predict` takes it."""
        return ",".join(f"{axis}={size}" for axis, size in self.mesh.items())


def predict(config: ModelConfig, mesh: str, workload: Workload, interconnect: str = "nvlink+infiniband") -> Prediction:
    """The cost of one step.

    Args:
      config: the model's, such as `jax_moe_lora.benchmark.models.model_config` gives.
      mesh: such as `data=2,expert=4`.
      workload: what the step does.
      interconnect: a name of `hardware.CLUSTERS`.

    Raises:
      InputError: no such mesh or interconnect, a mesh that does not divide the model, or more devices than a node has
        where there is one node.
    """
    return _predict(config, _grid(parse_mesh(mesh)), workload, _cluster(interconnect))


def meshes_of(config: ModelConfig, devices: int) -> list[str]:
    """The meshes of a number of devices that divide a model, axes of one part left out.

    Args:
      config: the model's.
      devices: their number.
    """
    found = []
    for sizes in itertools.product(_divisors(devices), repeat=len(AXES)):
        if math.prod(sizes) == devices:
            named = dict(zip(AXES, sizes, strict=True))
            try:
                check_mesh(config, _grid(named))
            except InputError:
                continue
            found.append(",".join(f"{axis}={size}" for axis, size in named.items() if size > 1) or "data=1")
    return found


def rank_meshes(
    config: ModelConfig, devices: int, workload: Workload, interconnect: str = "nvlink+infiniband"
) -> list[Prediction]:
    """Steps on all meshes of a number of devices: those that fit first, then those with a note, the fastest first.

    Args:
      config: the model's.
      devices: their number.
      workload: what the step does.
      interconnect: a name of `hardware.CLUSTERS`.

    Raises:
      InputError: no such interconnect, or more devices than a node has where there is one node.
    """
    found = [predict(config, mesh, workload, interconnect) for mesh in meshes_of(config, devices)]
    return sorted(found, key=lambda one: (not one.fits, bool(one.notes), one.step_s if one.fits else one.memory.total))


def sum_seconds(nbytes: int, mesh: str, interconnect: str = "nvlink+infiniband") -> float:
    """The time of one sum over all devices of a mesh.

    Args:
      nbytes: of the array that each device gives and gets.
      mesh: such as `tensor=2`.
      interconnect: a name of `hardware.CLUSTERS`.

    Raises:
      InputError: as `predict`.
    """
    grid = _grid(parse_mesh(mesh))
    return seconds(Sum(tuple(grid.shape), grid.size, nbytes), grid, _cluster(interconnect))


def _divisors(count: int) -> Iterator[int]:
    return (size for size in range(1, count + 1) if count % size == 0)


def _grid(sizes: dict[str, int]) -> AbstractMesh:
    names = tuple(axis for axis in AXES if axis in sizes)
    return AbstractMesh(tuple(sizes[axis] for axis in names), names)


def _cluster(name: str) -> Cluster:
    if name not in CLUSTERS:
        raise InputError(f"interconnect is {name!r}; expected one of {', '.join(CLUSTERS)}.")
    return CLUSTERS[name]


@dataclass(frozen=True)
class _Case:
    """What all layers of a prediction have in common.

    Attributes:
      config: the model.
      mesh: the sizes of the axes.
      workload: what all devices do together.
      cluster: the devices.
      step: what each part of `data` does.
      sites: the modules with adapters, as the mesh splits them.
    """

    config: ModelConfig
    mesh: AbstractMesh
    workload: Workload
    cluster: Cluster
    step: Step
    sites: dict[str, Site]


def _predict(config: ModelConfig, mesh: AbstractMesh, workload: Workload, cluster: Cluster) -> Prediction:
    check_mesh(config, mesh)
    check_reach(mesh, cluster)
    step = Step(workload.kind, math.ceil(workload.batch / parts(mesh, DATA_AXIS)), workload.length)
    modules = EXPERT_MODULES if workload.targets == "experts" else None
    sites = split_sites(config, select_sites(config, modules), mesh) if workload.adapters else {}
    case = _Case(config, mesh, workload, cluster, step, sites)
    memory = memory_of(
        config,
        mesh,
        sites,
        requests=step.batch,
        positions=workload.positions or workload.needed,
        adapters=workload.adapters,
        rank=workload.rank,
        shared=workload.shared,
        weights=workload.weights,
    )
    layers = (*(_layer(case, layer, count) for layer, count in config.kinds.items()), _head(case))
    return Prediction(dict(mesh.shape), layers, memory, cluster.device, workload.rows, _notes(config, mesh))


def _layer(case: _Case, layer: Layer, count: int) -> LayerCost:
    """The cost of one of the layers that are equal to this one."""
    config, mesh, step, device = case.config, case.mesh, case.step, case.cluster.device
    work = weights_work(layer, config.hidden_size, step, mesh, case.workload.weights)
    work += attention_work(layer, step, mesh)
    index = config.layers.index(layer)
    sites = {module: site for module, site in case.sites.items() if index in site.layers}
    for module, site in sites.items():
        work += _pages(case, module, site)
    sums = layer_sums(layer, config.hidden_size, step.rows, ITEMSIZE, mesh)
    device_s = _device_s(work, device) + device.layer_s + (device.adapted_layer_s if sites else 0.0)
    sums_s = math.fsum(seconds(one, mesh, case.cluster) for one in sums)
    return LayerCost(_kind(layer), count, work.read, work.multiplied, sums, device_s, sums_s)


def _pages(case: _Case, module: str, site: Site) -> Work:
    """The pages of a module in one layer; each request has drawn one of the adapters."""
    moe, workload, step = case.config.moe, case.workload, case.step
    chance = moe.top_k / moe.num_experts if site.num_experts > 1 else 1.0
    used = workload.adapters * (1 - (1 - 1 / workload.adapters) ** step.batch)
    return pages_work(module, site, used, step.rows / used, chance, workload.rank, workload.shared)


def _head(case: _Case) -> LayerCost:
    """The head, whole on each device: the last token's row of each request."""
    matrix = case.config.vocab_size * case.config.hidden_size
    work = Work(ITEMSIZE * matrix, case.step.batch * matrix)
    return LayerCost("head", 1, work.read, work.multiplied, (), _device_s(work, case.cluster.device), 0.0)


def _device_s(work: Work, device: Device) -> float:
    return max(
        work.read / (device.read_share * device.bytes_per_s),
        2 * work.multiplied / (device.multiply_share * device.flop_per_s),
    )


def _kind(layer: Layer) -> str:
    attention = sizes_of_attention(layer)
    window = getattr(attention, "window", None)
    mlp = "routed experts" if isinstance(layer.mlp, RoutedMLP) else "dense MLP"
    return f"{type(attention).__name__}{f' of {window}' if window else ''}, {mlp}"


def _notes(config: ModelConfig, mesh: AbstractMesh) -> tuple[str, ...]:
    width = config.moe.expert_width // parts(mesh, TENSOR_AXIS)
    if width % KERNEL_WIDTH:
        return (
            f"an expert has {width} columns on a device, which is no multiple of {KERNEL_WIDTH}: it runs through XLA",
        )
    return ()
