"""The collectives of a decoder layer: which axes of the mesh each goes over, its bytes, and its time on a cluster."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jax.sharding import AbstractMesh

from jax_moe_lora.errors import InputError
from jax_moe_lora.mesh.rules import AXES, mesh_axes, parts
from jax_moe_lora.mesh.scaling.hardware import Cluster
from jax_moe_lora.models.specs.gemma4 import Gemma4Layer
from jax_moe_lora.models.specs.model import Layer
from jax_moe_lora.models.specs.parameter import Parameter


@dataclass(frozen=True)
class Sum:
    """A sum of what several devices have, which all of them get.

    Attributes:
      axes: of the mesh, outermost first.
      devices: in each sum.
      nbytes: of the array that each device gives and gets.
    """

    axes: tuple[str, ...]
    devices: int
    nbytes: int


def layer_sums(layer: Layer, hidden_size: int, rows: int, itemsize: int, mesh: AbstractMesh) -> tuple[Sum, ...]:
    """The collectives of a layer: one at the end of each block of which devices have parts.

    Args:
      layer: the layer.
      hidden_size: D.
      rows: tokens that a device sees.
      itemsize: bytes of a number of the hidden rows.
      mesh: the sizes of the axes.
    """
    arrays = 2 if isinstance(layer, Gemma4Layer) else 1  # dense and routed are normed apart, and summed together
    mlp = [*layer.mlp.parameters(hidden_size)]
    if isinstance(layer, Gemma4Layer):
        mlp += layer.dense.parameters(hidden_size)
    sums = []
    for table, count in ((layer.attention.parameters(hidden_size), 1), (mlp, arrays)):
        axes = _split_over(table, mesh)
        if axes:
            devices = math.prod(parts(mesh, axis) for axis in axes)
            sums.append(Sum(axes, devices, count * rows * hidden_size * itemsize))
    return tuple(sums)


def _split_over(table: Sequence[Parameter], mesh: AbstractMesh) -> tuple[str, ...]:
    """The axes of the mesh that some parameter of a block is split over."""
    found = {name for row in table for axis in row.axes for name in mesh_axes(axis, mesh)}
    return tuple(axis for axis in AXES if axis in found)


def seconds(one: Sum, mesh: AbstractMesh, cluster: Cluster) -> float:
    """The time of a collective: its start, the hops of a tree, and the bytes through the slowest link of a ring.

    Args:
      one: the collective.
      mesh: the sizes of the axes; devices are numbered with neighbours along the last axis.
      cluster: the devices.

    Raises:
      InputError: the mesh needs several nodes, and the cluster has one.
    """
    nodes, together = _spread(one.axes, tuple(mesh.shape.items()), cluster.node)
    hops = (math.ceil(one.devices / nodes) - 1) * cluster.within.hop_s
    speed = cluster.within.bytes_per_s
    if nodes > 1:
        check_reach(mesh, cluster)
        assert cluster.between is not None
        hops += math.ceil(math.log2(nodes)) * cluster.between.hop_s
        between = together * cluster.between.bytes_per_s  # every device of the group has a port of its own
        speed = between if together == 1 else min(speed, between)
    sent = 2 * (one.devices - 1) / one.devices * one.nbytes
    return cluster.start_s + 2 * hops + sent / speed


def check_reach(mesh: AbstractMesh, cluster: Cluster) -> None:
    """Refuses a mesh of several nodes where there is one.

    Args:
      mesh: the sizes of the axes.
      cluster: the devices.

    Raises:
      InputError: with both sizes.
    """
    if mesh.size > cluster.node and cluster.between is None:
        raise InputError(f"The mesh has {mesh.size} devices; this interconnect is that of one node of {cluster.node}.")


@lru_cache(maxsize=4096)
def _spread(axes: tuple[str, ...], sizes: tuple[tuple[str, int], ...], node: int) -> tuple[int, int]:
    """Of the groups of devices that sum over some axes: the most nodes of one, and the fewest devices in a node."""
    groups: dict[int, list[int]] = {}
    for device in range(math.prod(size for _, size in sizes)):
        rest, group, place = device, 0, 1
        for name, size in reversed(sizes):
            rest, index = divmod(rest, size)
            if name not in axes:
                group += place * index
                place *= size
        groups.setdefault(group, []).append(device // node)
    spread = [Counter(nodes) for nodes in groups.values()]
    return max(map(len, spread)), min(min(counts.values()) for counts in spread)
