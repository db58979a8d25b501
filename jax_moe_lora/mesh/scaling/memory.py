"""What one device of a mesh holds: weights, the pages of adapters, and the cache."""

from dataclasses import dataclass

from jax.sharding import AbstractMesh

from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.mesh.scaling.costs import ITEMSIZE, cache_bytes, nbytes, pages_bytes, part
from jax_moe_lora.models.specs.model import ModelConfig, layer_parameters


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      weights: of the model.
      pages: of all adapters.
      cache: of the requests.
    """

    weights: int
    pages: int
    cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.pages + self.cache


def weights_bytes(config: ModelConfig, mesh: AbstractMesh, weights: str) -> int:
    """Bytes of the weights on one device; embedding, head and norms are whole on each.

    Args:
      config: the model.
      mesh: the sizes of the axes.
      weights: as in `costs.nbytes`.
    """
    matrices = 1 if config.tie_embeddings else 2
    count = (matrices * config.vocab_size + 1) * config.hidden_size + config.vocab_size * config.head_bias
    count += config.hidden_size * (config.norm.kind == "layer")
    layers = sum(
        number * sum(nbytes(row, part(row, mesh), weights) for row in layer_parameters(layer, config.hidden_size))
        for layer, number in config.kinds.items()
    )
    return count * ITEMSIZE + layers


def memory_of(
    config: ModelConfig,
    mesh: AbstractMesh,
    sites: dict[str, Site],
    *,
    requests: int,
    positions: int,
    adapters: int,
    rank: int,
    shared: bool,
    weights: str,
) -> Memory:
    """What a device holds.

    Args:
      config: the model.
      mesh: the sizes of the axes.
      sites: the modules with adapters, as the mesh splits them.
      requests: of one part of the `data` axis.
      positions: of the cache.
      adapters: number of loaded ones.
      rank: of all of them.
      shared: as in `costs.pages_work`.
      weights: as in `costs.nbytes`.
    """
    cache = sum(number * cache_bytes(layer, requests, positions, mesh) for layer, number in config.kinds.items())
    pages = pages_bytes(sites, adapters, rank, shared) if adapters else 0
    return Memory(weights_bytes(config, mesh, weights), pages, cache)
