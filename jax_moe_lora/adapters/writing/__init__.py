"""Writing adapters, in the layouts that `adapters/formats/` reads.

`draft.py`: what all layouts share: parts of a file, and what is refused, copied or rescaled on the way to them.
`peft.py`, `stacks.py`: the parts of each layout. `config.py`: ranks and scales as a config says them. `write.py`: the
folder.
"""

from jax_moe_lora.adapters.writing.write import LAYOUTS, plan_adapter, write_adapter

__all__ = ["LAYOUTS", "plan_adapter", "write_adapter"]
