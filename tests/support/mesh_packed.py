"""Experts in few bits on a mesh, packed by each device, against those in rows; prints a JSON line for each format."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.mesh.rules import make_mesh
from jax_moe_lora.models.quantised.for_kernels import pack_experts
from pallas_kernels import backend
from pallas_kernels.ops import Quantised, dequantise, quantise
from pallas_kernels.quantised.split import split_specs
from support.meshes import report

SPLITS = {"gate": P("expert", "tensor", None), "up": P("expert", "tensor", None), "down": P("expert", None, "tensor")}


def placed(weight: Quantised, spec: P, mesh) -> Quantised:
    specs = split_specs(weight, spec)
    return jax.tree.map(lambda leaf, own: jax.device_put(leaf, NamedSharding(mesh, own)), weight, specs)


def main(mesh_text: str, *names: str) -> None:
    backend.device_capability = lambda: ((9, 0), "compute capability 9.0")  # nothing is multiplied here
    mesh = make_mesh(mesh_text)
    rng = np.random.default_rng()
    for name in names:
        arrays = {key: jnp.asarray(rng.standard_normal((4, 256, 256)), jnp.float32) for key in SPLITS}
        weights = {key: quantise(array, name) for key, array in arrays.items()}
        numbers = {key: np.asarray(dequantise(weight, jnp.bfloat16)) for key, weight in weights.items()}
        layer = {key: placed(weight, SPLITS[key], mesh) for key, weight in weights.items()}
        (packed,) = pack_experts((layer,), "bfloat16")
        first = packed["down"].values
        report(
            format=name,
            layout=packed["down"].format.layout,
            equal=all(
                bool((np.asarray(dequantise(packed[key], jnp.bfloat16)) == numbers[key]).all()) for key in SPLITS
            ),
            share=first.addressable_shards[0].data.size / first.size,
            freed=layer["down"].values.is_deleted(),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
