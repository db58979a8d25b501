"""A process of several that answers without end, a line a token; or one that waits for others in vain."""

import sys
from pathlib import Path

from jax_moe_lora import Model
from jax_moe_lora.mesh.processes import initialize

PROMPT = [[1, 2, 3]]

if __name__ == "__main__":
    folder, mesh, seconds = sys.argv[1:]
    initialize(start_seconds=int(seconds))
    model = Model.from_pretrained(Path(folder), dtype="float32", max_adapters=1, max_rank=16, mesh=mesh)
    while True:
        for token in model.stream(PROMPT, max_new_tokens=32, ignore_eos=True):
            print(token.token_id, flush=True)
