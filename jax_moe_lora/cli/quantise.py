"""`jax-moe-lora quantise`: a 16-bit checkpoint in a published quantised form."""

import sys
from typing import Annotated

import typer

from jax_moe_lora.cli.convert import Force, Out
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.files.sizes import format_bytes


def quantise(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a 16-bit checkpoint.")],
    out: Out,
    format: Annotated[
        str,
        typer.Option(help="fp8 (DeepSeek's blocks), mxfp4 (gpt-oss's, or compressed-tensors), int4 or int4_g128."),
    ],
    max_shard_size: Annotated[str, typer.Option(help="Of the tensors in one file.")] = "5GB",
    force: Force = False,
) -> None:
    """Write a quantised copy of a checkpoint, in a published form (docs/quantised.md says who reads which)."""
    from jax_moe_lora.tools.quantise import quantise_checkpoint

    quantise_checkpoint(local_folder(model), out, format, max_shard_size=max_shard_size, force=force)
    size = sum(path.stat().st_size for path in out.iterdir())
    sys.stdout.write(f"{out}: {format}, {format_bytes(size)}\n")
