"""Any number of adapters behind the slots of one bank.

- `registry.py`: names, slots, references and who is evicted, on the host alone.
- `agreement.py`: what several processes decide together, and on which thread adapters are loaded.
- `holds.py`: which slots are in use, and from which threads.
- `content.py`: whether a folder has changed.
- `shared_bank.py`: the bank that steps read while a loader writes.
- `pool.py`: `AdapterPool`, which ties them together and loads adapters while others run.
- `status.py`: what users are told of adapters.
"""

from jax_moe_lora.adapters.pool.pool import AdapterPool
from jax_moe_lora.adapters.pool.status import AdapterInfo, AdapterStatus

__all__ = ["AdapterInfo", "AdapterPool", "AdapterStatus"]
