"""`jax-moe-lora convert` and `merge`: adapters in another layout, and in their base model's weights."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.adapters.writing import LAYOUTS, write_adapter
from jax_moe_lora.cli.options import LoraBLayout
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.files.sizes import format_bytes
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.tools.read import read_adapter

if TYPE_CHECKING:
    from jax_moe_lora.tools.requantise import Requantised

Adapter = Annotated[str, typer.Argument(help="Adapter folder in any layout, or a hub id.")]
Out = Annotated[Path, typer.Argument(help="The folder to write, which appears whole or not at all.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT, if it holds what is written.")]


def convert(
    adapter: Adapter,
    out: Out,
    model: Annotated[str, typer.Option(help="Folder or hub id of its base model; its config alone is read.")],
    to: Annotated[str, typer.Option(help=f"The layout: {', '.join(LAYOUTS)}.")],
    expand: Annotated[bool, typer.Option("--expand", help="Write copies of what the layout cannot share.")] = False,
    fold_scale: Annotated[
        bool, typer.Option("--fold-scale", help="Multiply B by a scale that the config cannot say; rounds B.")
    ] = False,
    lora_b_layout: LoraBLayout = None,
    force: Force = False,
) -> None:
    """Write an adapter in another layout: the same matrices, ranks and scales, or one sentence on why not.

    Copies and whatever else differs from ADAPTER are said on standard output.
    """
    read, sites, names = _read(adapter, local_folder(model), lora_b_layout)
    notes = write_adapter(read, out, sites, names, to, expand=expand, fold_scale=fold_scale, force=force)
    _say(out, to, *notes)


def merge(
    adapter: Adapter,
    out: Out,
    model: Annotated[str, typer.Option(help="Folder or hub id of its base model.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; each tensor keeps its own if not given.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of the tensors in one file.")] = "5GB",
    requantise: Annotated[
        bool,
        typer.Option("--requantise", help="Into a quantised base: round the sums again, and say what that costs."),
    ] = False,
    lora_b_layout: LoraBLayout = None,
    force: Force = False,
) -> None:
    """Merge an adapter into a copy of its base checkpoint, which transformers loads without any adapter library."""
    from jax_moe_lora.tools.merge import merge_adapter

    base = local_folder(model)
    read, _, _ = _read(adapter, base, lora_b_layout)
    report = merge_adapter(
        read, base, out, dtype=dtype, max_shard_size=max_shard_size, force=force, requantise=requantise
    )
    _say(out, "merged", *map(_rounding, report))


def _rounding(row: "Requantised") -> str:
    """What quantising a module again changed, as a line."""
    return (
        f"{row.module}: {row.matrices} matrices quantised again, relative error {row.error:.2g} of the weights and "
        f"{row.of_update:.2g} of the update, of which {row.kept:.0%} is kept"
    )


def _read(adapter: str, base: Path, lora_b_layout: str | None) -> tuple[LoRAAdapter, Mapping[str, Site], AdapterNames]:
    """The adapter, and its base model's projections and their names in files."""
    config = read_model_config(base)
    sites, names = adapter_sites(config), adapter_names(config)
    return read_adapter(adapter, base, lora_b_layout=lora_b_layout), sites, names


def _say(out: Path, what: str, *notes: str) -> None:
    size = sum(path.stat().st_size for path in out.iterdir())
    sys.stdout.write("".join(f"{line}\n" for line in (f"{out}: {what}, {format_bytes(size)}", *notes)))
