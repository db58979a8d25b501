"""Devices and what connects them, as data: each number with where it is from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What one device has, and how much of it programs reach.

    Attributes:
      name: of the device.
      memory: bytes.
      room: the share of the memory for weights, pages and cache; the rest is for activations and the runtime.
      bytes_per_s: bytes per second, read.
      flop_per_s: floating-point operations per second of a bfloat16 matmul.
      read_share: the share of `bytes_per_s` that a step reaches when it reads.
      multiply_share: the share of `flop_per_s` that a step reaches when it multiplies.
      layer_s: seconds of a layer that neither reads nor multiplies: starts of kernels, and small ones.
      adapted_layer_s: seconds more where a layer has adapters.
    """

    name: str
    memory: float
    room: float
    bytes_per_s: float
    flop_per_s: float
    read_share: float
    multiply_share: float
    layer_s: float
    adapted_layer_s: float


@dataclass(frozen=True)
class Link:
    """A connection between devices.

    Attributes:
      bytes_per_s: bytes per second out of one device, and as many into it.
      hop_s: seconds from one device to the next, however small the message is.
    """

    bytes_per_s: float
    hop_s: float


@dataclass(frozen=True)
class Cluster:
    """Devices in nodes.

    Attributes:
      device: each of them.
      node: devices of a node.
      within: the link between the devices of a node.
      between: the link between nodes, of which each device has one; None for a single node.
      start_s: seconds of a collective before anything is sent.
    """

    device: Device
    node: int
    within: Link
    between: Link | None
    start_s: float


# Memory: NVIDIA's data sheet (141 GB). Bandwidth and multiplications: measured on one H200, reading alone and a matmul
# of random numbers. The last four: fitted to a whole model on one H200 (docs/scaling.md shows what they miss).
H200 = Device(
    name="NVIDIA H200",
    memory=141e9,
    room=0.9,
    bytes_per_s=4.3e12,
    flop_per_s=790e12,
    read_share=0.9,
    multiply_share=0.6,
    layer_s=43e-6,
    adapted_layer_s=27e-6,
)
MEASURED_SUMS = ((8 * 4096, 18e-6), (128 * 4096, 29e-6), (2048 * 4096, 60e-6), (8192 * 4096, 170e-6))
"""Bytes and seconds of a sum over two H200s of one host (`NV18` between them): `jax.lax.psum` of rows of 2048 bfloat16,
the mean of 50 that depend on each other in one program; jax 0.11.2, 2026-11-30, NVLink multicast off."""
# Fitted to them; 14 us pass before anything is sent. The data sheet says 450 GB/s each way.
_NVLINK = Link(bytes_per_s=220e9, hop_s=2e-6)
# An NDR port of 400 Gb/s (50 GB/s) for each GPU, as DGX H200 has, at four fifths: assumed, not measured. The hop is the
# latency that NCCL's own model has for a tree over a network (src/graph/tuning.cc, LL128).
_INFINIBAND = Link(bytes_per_s=40e9, hop_s=8.5e-6)
_START_S = 14e-6

CLUSTERS: Mapping[str, Cluster] = {
    "nvlink": Cluster(H200, 8, _NVLINK, None, _START_S),
    "nvlink+infiniband": Cluster(H200, 8, _NVLINK, _INFINIBAND, _START_S),
    "infiniband": Cluster(H200, 1, _NVLINK, _INFINIBAND, _START_S),
}
"""Interconnect by name: H200s in one node of 8, in nodes of 8 with a port for each GPU, and one to a node."""
