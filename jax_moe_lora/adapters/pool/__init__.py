"""Any number of adapters behind the slots of one bank.

`registry.py`: names, slots, references and who is evicted, on the host alone. `content.py`: whether a folder changed.
`pool.py`: `AdapterPool`, which ties them to a bank and loads adapters while others run. `status.py`: what it tells.
"""

from jax_moe_lora.adapters.pool.pool import AdapterPool
from jax_moe_lora.adapters.pool.status import AdapterInfo, AdapterStatus

__all__ = ["AdapterInfo", "AdapterPool", "AdapterStatus"]
