"""What a model costs on a mesh of any size, without having one: bytes moved, time and memory, as a prediction.

`workload.py`: what a step does. `hardware.py`: devices and links as data, with sources. `sums.py`: the collectives of a
layer. `costs.py`: what a device reads and multiplies. `memory.py`: what it holds. `prediction.py`: all of it.
"""

from jax_moe_lora.mesh.scaling.hardware import CLUSTERS, H200, MEASURED_SUMS, Cluster, Device, Link
from jax_moe_lora.mesh.scaling.prediction import Prediction, meshes_of, predict, rank_meshes, sum_seconds
from jax_moe_lora.mesh.scaling.workload import Workload

__all__ = [
    "CLUSTERS",
    "H200",
    "MEASURED_SUMS",
    "Cluster",
    "Device",
    "Link",
    "Prediction",
    "Workload",
    "meshes_of",
    "predict",
    "rank_meshes",
    "sum_seconds",
]
