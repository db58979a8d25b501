"""What a bank is made of, before there is one: checks of its arguments, and the sizes that a memory budget gives."""

from collections.abc import Mapping

import numpy as np

from jax_moe_lora.adapters.lora import PoolWidth, Site, SplitWidth
from jax_moe_lora.arguments import whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.sizes import format_bytes
from pallas_kernels.constants import RANK_PAGE


def check_replacements(
    max_replacements: int, vocabulary: tuple[int, int] | None, memory: int | None, dtype: np.dtype
) -> tuple[int, tuple[int, int]]:
    """C, V and D, for which there is memory."""
    count = whole("max_replacements", max_replacements, 0)
    if not count:
        return 0, (0, 0)
    if not isinstance(vocabulary, tuple) or len(vocabulary) != 2:
        raise InputError(f"vocabulary is {vocabulary!r}; expected the shape (V, D) of what max_replacements replace.")
    shape = whole("V of vocabulary", vocabulary[0], 1), whole("D of vocabulary", vocabulary[1], 1)
    if memory is not None and count * (size := matrix_bytes(shape, dtype)) >= memory:
        raise InputError(
            f"max_replacements is {count}, and each takes {format_bytes(size)} of the bank's {format_bytes(memory)}; "
            f"give adapter_memory more than {count * size} bytes, or fewer max_replacements."
        )
    return count, shape


def pool_sizes(sites: Mapping[str, Site], most: int, memory: int | None, dtype: np.dtype) -> dict[PoolWidth, int]:
    """The size of each pool, or of each of its regions.

    Args:
      sites: the projections that adapters may target.
      most: pages that all slots need of each matrix.
      memory: byte budget of all pools, on each device; None for no limit.
      dtype: of the pages.

    Returns:
      Width -> pages, page 0 not counted.
    """
    # Width -> matrices of one adapter that targets everything, per expert, in a region.
    matrices: dict[PoolWidth, int] = {}
    for site in sites.values():
        for width in site.pools:
            matrices[width] = matrices.get(width, 0) + len(site.layers) * site.num_experts // site.regions
    per_rank_page = sum(count * _part_bytes(width, dtype) for width, count in matrices.items())
    share = most if memory is None else min(most, memory / per_rank_page)
    sizes = {width: int(count * share) for width, count in matrices.items()}
    if min(sizes.values()) < 1:
        least = max(per_rank_page // count for count in matrices.values())
        raise InputError(
            f"A bank of {memory} bytes has no room for a page of each kind; give adapter_memory at least {least} bytes."
        )
    return sizes


def check_sites(sites: Mapping[str, Site]) -> None:
    """Raises an InputError for sites that no bank can be made of."""
    if not isinstance(sites, Mapping) or not sites:
        raise InputError(f"sites are {sites!r}; expected module -> Site, for at least one module.")
    for module, site in sites.items():
        if not isinstance(module, str) or not isinstance(site, Site):
            raise InputError(f"sites have {site!r} under {module!r}; expected a Site under a module's name.")
        for name in ("in_width", "out_width", "num_experts"):
            whole(f"{name} of {module}", getattr(site, name), 1)
        if not isinstance(site.layers, tuple) or not site.layers or len({*site.layers}) < len(site.layers):
            raise InputError(f"layers of {module} are {site.layers!r}; expected a tuple of different layers.")
        for layer in site.layers:
            whole(f"a layer of {module}", layer, 0)


def matrix_bytes(shape: tuple[int, int], dtype: np.dtype) -> int:
    """Bytes of one whole matrix.

    Args:
      shape: V and D.
      dtype: of its values.
    """
    return shape[0] * shape[1] * dtype.itemsize


def page_bytes(width: PoolWidth, dtype: np.dtype) -> int:
    """Bytes of one page.

    Args:
      width: of its rows.
      dtype: of its values.
    """
    return RANK_PAGE * int(width) * np.dtype(dtype).itemsize


def regions_of(width: PoolWidth) -> int:
    """Regions of a pool."""
    return width.regions if isinstance(width, SplitWidth) else 1


def _part_bytes(width: PoolWidth, dtype: np.dtype) -> int:
    """Bytes of a page on one of the devices that have a part of it."""
    return page_bytes(width, dtype) // (width.parts if isinstance(width, SplitWidth) else 1)
