"""`jax-moe-lora families`: what is supported, and what each family is made of."""

import json
import sys
from dataclasses import asdict

from rich.table import Table

from jax_moe_lora.cli.options import AsJson, console


def families(as_json: AsJson = False) -> None:
    """List the model types that are supported: their blocks, what adapters may target, what is refused."""
    from jax_moe_lora.models.families.summary import summaries

    found = summaries()
    if as_json:
        sys.stdout.write(json.dumps([asdict(one) for one in found], indent=2) + "\n")
        return
    table = Table("model type", "attention", "router", "beside them", "adapters may target", "refused", show_lines=True)
    for one in found:
        names = "\n".join((one.model_type, *one.wrappers))
        columns = ("\n".join(lines) for lines in (one.attention, (one.router,), one.others, one.targets))
        table.add_row(names, *columns, one.refuses)
    console().print(table)
