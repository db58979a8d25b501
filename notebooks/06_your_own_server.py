# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A server of your own
#
# You will write a server of 60 lines: requests of different lengths, each with its own LoRA adapter, join a batch that
# is running, and leave it when they are done. Their answers equal those of `generate`, nothing compiles after the
# warm-up, and an adapter is replaced while others run.
#
# `generate` answers a batch and returns when its last request is done. A server cannot wait for that: it gives a row to
# the next request as soon as one is free. `functional` has what that takes, as pure functions over a cache.
#
# To run it: `pip install ".[notebooks]"` in a clone of the repository. A CPU is enough; it takes about a minute.

# %%
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jax_moe_lora import BASE_SLOT, AdapterInUseError, Model, count_compilations, plots
from jax_moe_lora.demo import data_folder

plots.show_as_svg()
ROWS, WIDTH, LENGTH = 4, 16, 32  # of the batch; tokens of the longest prompt; tokens of prompt and answer
folders = data_folder() / "adapters"
model = Model.from_pretrained(data_folder() / "model", dtype="float32", max_adapters=3)
for name in ("upper", "reverse", "sort"):
    model.register_adapter(folders / name, name)
fn = model.functional(ROWS, LENGTH)


# %% [markdown]
# ## The server
#
# A request that joins acquires its adapter: the slot stays the adapter's until it is released. `insert_rows` reads the
# prompt into a row of the running cache and leaves the other rows alone. `decode` takes one step of all rows, whatever
# their lengths and adapters are. `model.run` calls a function with the parameters and the adapters of this moment.


# %%
@dataclass
class Request:
    text: str
    adapter: str | None
    limit: int = 12
    tokens: list[int] = field(default_factory=list)


class Server:
    def __init__(self):
        self.cache, self.waiting, self.steps = fn.init_cache(), deque(), []
        self.rows: list[Request | None] = [None] * ROWS
        self.tokens, self.slots = np.zeros(ROWS, np.int32), np.full(ROWS, BASE_SLOT, np.int32)

    def join(self, row: int, request: Request) -> None:
        self.rows[row], self.slots[row] = request, model.acquire([request.adapter])[0]
        ids = model.tokenizer.encode(request.text)
        prompt = np.asarray([ids + [0] * (WIDTH - len(ids))], np.int32)
        lengths, named = np.asarray([len(ids)], np.int32), np.asarray([row], np.int32)
        self.cache, logits = model.run(fn.insert_rows, self.cache, named, prompt, lengths, self.slots[[row]])
        self.take(row, np.asarray(logits)[0])

    def take(self, row: int, logits: np.ndarray) -> None:
        token, request = int(logits.argmax()), self.rows[row]
        if token not in model.config.eos_token_ids:
            request.tokens.append(token)
            self.tokens[row] = token
        if token in model.config.eos_token_ids or len(request.tokens) == request.limit:
            self.leave(row)

    def leave(self, row: int) -> None:
        self.cache = fn.free_rows(self.cache, np.asarray([row], np.int32))
        model.release(self.slots[row])
        self.rows[row], self.slots[row] = None, BASE_SLOT

    def step(self) -> None:
        for row in range(ROWS):
            if self.rows[row] is None and self.waiting:
                self.join(row, self.waiting.popleft())
        self.steps.append([None if request is None else request.adapter or "base" for request in self.rows])
        self.cache, logits = model.run(fn.decode, self.cache, self.tokens.copy(), self.slots.copy())
        for row, of_row in enumerate(np.asarray(logits)):
            if self.rows[row] is not None:
                self.take(row, of_row)

    def run(self, requests: list[Request]) -> list[str]:
        self.waiting.extend(requests)
        while self.waiting or any(self.rows):
            self.step()
        return [model.tokenizer.decode(request.tokens) for request in requests]


# %% [markdown]
# ## Requests join and leave
#
# One request warms the server up: it compiles the programs for joining, decoding and leaving. Then ten requests of
# different lengths share four rows. Their answers are compared with those of `generate`.

# %%
server = Server()
server.run([Request("ab>", "upper")])
texts = ["hello>", "a>", "zyx>", "server>", "of>", "your>", "own>", "abcdefgh>", "row>", "done>"]
adapters = [None, "upper", "sort", "reverse", "upper", "sort", None, "reverse", "upper", "sort"]
expected = [answer.text for answer in model.generate(texts, adapters, max_new_tokens=12)]
server.steps.clear()
with count_compilations() as count:
    answers = server.run([Request(text, adapter) for text, adapter in zip(texts, adapters, strict=True)])
for text, adapter, answer in zip(texts, adapters, answers, strict=True):
    print(f"{adapter or 'base':8} {text:10} {answer}")
print(f"equal to generate: {answers == expected}; compilations: {count.compilations}; steps: {len(server.steps)}")

# %% [markdown]
# ## Who was in which row
#
# Each colour is an adapter. A row is given to the next request in the step after it is free.

# %%
colours = {None: 0, "base": 1, "upper": 2, "reverse": 3, "sort": 4}
axes = plots.heatmaps(
    {"": np.asarray([[colours[name] for name in names] for names in server.steps]).T.astype(float)},
    [f"row {row}" for row in range(ROWS)],
    [str(step) for step in range(len(server.steps))],
    title="Rows of the batch over time",
    label="0 free, 1 base, 2 upper, 3 reverse, 4 sort",
    xlabel="step",
    digits=0,
)

# %% [markdown]
# ## An adapter is replaced while others run
#
# Two requests run. The adapter of one is held, so it cannot be unloaded. Nobody uses `upper`, so it can be replaced:
# the next request that names it, in the same batch, gets the new one. Still nothing compiles.

# %%
running = [Request("abcdefgh>", "reverse"), Request("hgfedcba>", None)]
server.waiting.extend(running)
with count_compilations() as count:
    server.step()
    try:
        model.unload_adapter("reverse")
    except AdapterInUseError as error:
        print(error)
    model.unload_adapter("upper")
    model.register_adapter(folders / "shift", "upper")
    late = Request("abc>", "upper")
    server.run([late])
for request in (*running, late):
    print(f"{request.adapter or 'base':8} {request.text:10} {model.tokenizer.decode(request.tokens)}")
print(f"compilations: {count.compilations}")
