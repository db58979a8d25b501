"""What one device reads and multiplies in a step of a model: of each layer's weights, pages, cache and attention.

Every byte in use is read once. Experts and pages in use are the expected ones under uniform routing. Of attention that
keeps a state and no keys (delta-net), the multiplications within a chunk are left out.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import jax
from jax.sharding import AbstractMesh

from jax_moe_lora.adapters.lora import SHARED_OUTER, SIDES, PoolWidth, Site, SplitWidth
from jax_moe_lora.mesh.rules import EXPERT_AXIS, mesh_axes, parts
from jax_moe_lora.models.blocks.registry import ATTENTION
from jax_moe_lora.models.quantised.schemes import KEPT
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import Attention, Layer, layer_parameters, sizes_of_attention
from jax_moe_lora.models.specs.parameter import Axis, Parameter
from pallas_kernels.constants import RANK_PAGE
from pallas_kernels.quantised.format import FORMATS, Format

DTYPE = "bfloat16"
ITEMSIZE = 2
ONE_DEVICE = AbstractMesh((), ())


@dataclass(frozen=True)
class Step:
    """The size of one step.

    Attributes:
      kind: `decode` or `prefill`.
      batch: number of requests.
      length: tokens in the cache before a decode step, or of a prompt.
    """

    kind: str
    batch: int
    length: int

    @property
    def rows(self) -> int:
        """Tokens that go through the layers."""
        return self.batch * (self.length if self.kind == "prefill" else 1)


@dataclass(frozen=True)
class Work:
    """What one device does.

    Attributes:
      read: bytes.
      multiplied: multiplications, each with an addition.
    """

    read: float = 0.0
    multiplied: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.read + other.read, self.multiplied + other.multiplied)

    def times(self, count: int) -> "Work":
        """The same so many times.

        Args:
          count: number of times.
        """
        return Work(self.read * count, self.multiplied * count)


def part(row: Parameter, mesh: AbstractMesh) -> tuple[int, ...]:
    """The shape of what a device has of a parameter.

    Args:
      row: its row of the table.
      mesh: the sizes of the axes.
    """
    return tuple(width // _parts(axis, mesh) for width, axis in zip(row.shape, row.axes, strict=True))


def _parts(axis: Axis | None, mesh: AbstractMesh) -> int:
    return math.prod(parts(mesh, name) for name in mesh_axes(axis, mesh))


def nbytes(row: Parameter, shape: tuple[int, ...], weights: str) -> int:
    """Bytes of a parameter, or of a part of it.

    Args:
      row: its row of the table.
      shape: of the part.
      weights: `bfloat16`, or the format of all projections but those of `schemes.KEPT` (`quantised.format.FORMATS`).
    """
    if row.projection and weights != DTYPE and row.name not in KEPT:
        return quantised_bytes(shape, FORMATS[weights])
    return math.prod(shape) * (4 if row.float32 else ITEMSIZE)


def quantised_bytes(shape: tuple[int, ...], format: Format) -> int:
    """Bytes of a quantised matrix or a stack of them, scales included; those of int4 are in 16 bits.

    Args:
      shape: `[..., out, in]`.
      format: what it is quantised to.
    """
    *lead, out, width = shape
    scales = {"fp8": 4, "mxfp4": 1, "nvfp4": 1}.get(format.codec, ITEMSIZE)  # bytes of one
    return math.prod(lead) * (out * width // format.per_byte + scales * math.prod(format.scales_shape(out, width)))


def in_use(chance: float, rows: float) -> float:
    """The expected share of experts that some row meets.

    Args:
      chance: of one expert to meet a row.
      rows: number of rows.
    """
    return 1.0 - (1.0 - min(1.0, chance)) ** rows


def busiest(experts: int, share: float, devices: int) -> float:
    """The share of its experts that the busiest of several devices uses: the others wait for it.

    The experts in use fall on the devices as drawn without replacement; the largest of several normal variables is
    Blom's approximation.

    Args:
      experts: E.
      share: of the experts in use on all devices.
      devices: that have E / devices experts each.
    """
    if devices == 1 or experts == 1:
        return share
    used = share * experts
    variance = used * (1 / devices) * (1 - 1 / devices) * (experts - used) / (experts - 1)
    largest = used / devices + NormalDist().inv_cdf((devices - 0.375) / (devices + 0.25)) * math.sqrt(variance)
    return min(1.0, largest * devices / experts)


def weights_work(layer: Layer, hidden_size: int, step: Step, mesh: AbstractMesh, weights: str = DTYPE) -> Work:
    """Reading a layer's weights in use, and the products with them.

    Args:
      layer: the layer.
      hidden_size: D.
      step: its size on one device.
      mesh: the sizes of the axes.
      weights: as in `nbytes`.
    """
    read = multiplied = 0.0
    share = chance = 1.0
    if isinstance(layer.mlp, RoutedMLP):
        moe = layer.mlp.moe
        chance = moe.top_k / moe.num_experts
        share = busiest(moe.num_experts, in_use(chance, step.rows), parts(mesh, EXPERT_AXIS))
    for row in layer_parameters(layer, hidden_size):
        if row.projection:
            shape = part(row, mesh)
            read += nbytes(row, shape, weights) * (share if row.experts else 1.0)
            multiplied += step.rows * math.prod(shape) * (chance if row.experts else 1.0)
    return Work(read, multiplied)


def attention_work(layer: Layer, step: Step, mesh: AbstractMesh) -> Work:
    """Reading a layer's cache at decode, or writing it at prefill, and the multiplications of scores and values.

    Args:
      layer: the layer.
      step: its size on one device.
      mesh: the sizes of the axes.
    """
    attention = sizes_of_attention(layer)
    moved, seen = float(cache_bytes(layer, step.batch, step.length, mesh)), float(step.length)
    if isinstance(attention, GQA):
        width, axis = 2 * attention.num_heads * attention.head_dim, attention.head_axes[0]
        seen = min(seen, attention.window or seen)
    elif isinstance(attention, MLA):
        width, axis = attention.num_heads * (attention.nope_dim + attention.rope_dim + attention.value_dim), "heads"
    else:
        return Work(moved)
    # The first `seen` tokens of a prompt see half of them on average.
    pairs = seen if step.kind == "decode" else step.length * seen - seen * seen / 2
    return Work(moved, step.batch * pairs * width / _parts(axis, mesh))


def cache_bytes(layer: Layer, batch: int, length: int, mesh: AbstractMesh) -> int:
    """Bytes of what a device keeps of a layer between steps: of a window the window, of a state all of it.

    Args:
      layer: the layer.
      batch: its requests.
      length: positions.
      mesh: the sizes of the axes.
    """
    axes = getattr(sizes_of_attention(layer), "cache_axes", ())
    return batch * _request_bytes(layer.attention, length) // math.prod(_parts(axis, mesh) for axis in axes)


@lru_cache(maxsize=4096)
def _request_bytes(spec: Attention, length: int) -> int:
    """Of the whole cache of one request."""
    arrays = jax.eval_shape(lambda: ATTENTION[type(spec)].init_cache(spec, 1, length, DTYPE))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def pages_work(module: str, site: Site, adapters: float, rows: float, chance: float, rank: int, shared: bool) -> Work:
    """Reading the pages in use of one module in one layer, and the products with them.

    Args:
      module: its name.
      site: its widths, and how a mesh splits them.
      adapters: in use.
      rows: of each of these adapters.
      chance: of an expert to meet a row; 1 for a module without experts.
      rank: of all adapters.
      shared: all experts have one matrix on the side that touches the hidden width.
    """
    local = site.num_experts // site.regions
    share = busiest(site.num_experts, in_use(chance, rows), site.regions) if site.num_experts > 1 else min(1.0, rows)
    read = multiplied = 0.0
    for side, width in zip(SIDES, site.pools, strict=True):
        matrix = rank * part_of_width(width)
        once = shared and SHARED_OUTER.get(module) == side
        read += ITEMSIZE * matrix * adapters * (min(1.0, rows) if once else local * share)
        multiplied += matrix * adapters * rows * chance * local
    return Work(read, multiplied)


def part_of_width(width: PoolWidth) -> int:
    """The width of a page's part on one device.

    Args:
      width: the pool's.
    """
    return width.width // width.parts if isinstance(width, SplitWidth) else width


def pages_bytes(sites: dict[str, Site], adapters: int, rank: int, shared: bool) -> int:
    """Bytes of the pages of some adapters on one device, zeros included, as a bank without a budget has them.

    Args:
      sites: the modules with adapters, as a mesh splits them.
      adapters: their number.
      rank: of all of them, in whole pages.
      shared: as in `pages_work`.
    """
    pages: dict[PoolWidth, int] = {}
    for module, site in sites.items():
        for side, width in zip(SIDES, site.pools, strict=True):
            once = shared and SHARED_OUTER.get(module) == side
            matrices = len(site.layers) * (1 if once else site.num_experts // site.regions)
            pages[width] = pages.get(width, 1) + matrices * adapters * -(-rank // RANK_PAGE)
    return sum(count * RANK_PAGE * part_of_width(width) * ITEMSIZE for width, count in pages.items())
