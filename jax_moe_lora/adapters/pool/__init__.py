"""Any number of adapters behind the slots of one bank.

`registry.py`: names, slots, references and who is evicted, on the host alone. `content.py`: whether a folder changed.
`pool.py`: `AdapterPool`, which ties them to a bank and loads adapters while others run.
"""

from jax_moe_lora.adapters.pool.pool import AdapterInfo, AdapterPool, AdapterStatus

__all__ = ["AdapterInfo", "AdapterPool", "AdapterStatus"]
