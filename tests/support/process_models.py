"""What one of several processes sees of a model that all of them run: a line of JSON."""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora import JaxMoELoRAError, Model
from jax_moe_lora.adapters.addressable import fetch
from jax_moe_lora.mesh.processes import exchange, initialize
from jax_moe_lora.models import checkpoint_tensors
from jax_moe_lora.serving.adapters import ServedAdapters
from jax_moe_lora.tools.compilations import count_compilations
from support.meshes import report
from support.read_parts import count_what_is_read

NAMES = [None, "a", "b", "a", None]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10], [4, 5, 6, 7]]
TOKENS = np.random.default_rng(1).integers(0, 32, (4, 6)).astype(np.int32)


def load(folder: Path, mesh: str | None) -> Model:
    model = Model.from_pretrained(folder / "model", dtype="float32", max_adapters=2, max_rank=32, mesh=mesh)
    for name in ("a", "b", "c"):
        model.register_adapter(folder / name, name)
    return model


def answers(model: Model, names: list[str | None], **options: Any) -> list[list[int]]:
    outs = model.generate(PROMPTS, names, max_new_tokens=6, ignore_eos=True, **options)
    return [out.token_ids for out in outs]


def own_loop(model: Model) -> np.ndarray:
    """A prompt joins a running cache, which goes on."""
    with model.hold(["a", None, "b", "a"]) as slots:
        fn = model.functional(batch=4, max_length=16)
        lengths = jnp.array([4, 3, 0, 2], jnp.int32)
        cache, first = fn.prefill(fn.params, fn.bank, fn.init_cache(), TOKENS, lengths, slots)
        row, length = jnp.array([2], jnp.int32), jnp.array([5], jnp.int32)
        cache, joined = fn.append_rows(fn.params, fn.bank, cache, row, TOKENS[3:4], length, slots[2:3])
        cache, last = fn.decode(fn.params, fn.bank, cache, jnp.asarray(TOKENS[:, 5]), slots)
    rows = np.array([0, 1, 3])
    return np.concatenate((np.asarray(first)[rows], np.asarray(joined), np.asarray(last)))


def loading_between_steps(model: Model) -> tuple[list[int], list[dict[str, int]]]:
    """The tokens of a stream in which other adapters come and go; and the slots that adapters have after each step."""
    tokens, slots = [], []
    for step, token in enumerate(model.stream([PROMPTS[0]], ["a"], max_new_tokens=6, ignore_eos=True, pad_to=(8, 16))):
        tokens.append(token.token_id)
        model.prefetch_adapters([["b"], ["c"], ["b"]][step % 3])
        slots.append({name: info.slot for name, info in model.adapters.items()})
    return tokens, slots


def refused(call: Any) -> list[str]:
    try:
        call()
    except JaxMoELoRAError as error:
        return [type(error).__name__, str(error)]
    return []


def parts(model: Model) -> int:
    """Bytes of the weights that this process has, each part once."""
    total = 0
    for leaf in jax.tree.leaves(model.params):
        total += sum({str(part.index): part.data.nbytes for part in leaf.addressable_shards}.values())
    return total


def be_slow() -> None:
    """Adapters are read later than in other processes."""
    read = ServedAdapters._read_adapter

    def slowly(self: ServedAdapters, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return read(self, *arguments, **options)

    ServedAdapters._read_adapter = slowly


def main(folder: Path, mesh: str) -> None:
    initialize(start_seconds=900)
    number = jax.process_index()
    checkpoint_tensors.PAGE_BYTES = 1
    read = count_what_is_read()
    if number == 1:
        be_slow()
    model = load(folder, mesh)
    seen: dict[str, Any] = {"read": read["model"], "parts": parts(model)}
    seen["answers"] = answers(model, NAMES)
    seen["base"] = answers(model, [None] * 5)
    seen["loop"] = own_loop(model).tolist()
    sampled = model.generate(PROMPTS, NAMES, max_new_tokens=6, temperature=1.0)
    seen["sampled"] = [[out.seed, *out.token_ids] for out in sampled]
    loading_between_steps(model)
    with count_compilations() as count:
        seen["stream"], seen["slots"] = loading_between_steps(model)
        seen["reloaded"] = answers(model, NAMES)
    seen["compilations"] = count.compilations

    here = folder / ("a" if number == 0 else "nothing")
    seen["missing"] = refused(lambda: model.register_adapter(here, "missing"))
    exchange("it is missing")
    here.mkdir(exist_ok=True)
    model.register_adapter(here, "broken")
    seen["broken"] = refused(lambda: answers(model, ["broken", "a", "a", "a", None]))
    outs = model.generate(
        PROMPTS, ["broken", "a", None, "a", None], max_new_tokens=6, ignore_eos=True, adapter_errors="return"
    )
    seen["others_answered"] = [out.token_ids for out in outs[1:]]
    prompts = [[1 + number, 2, 3]]
    seen["other_prompts"] = refused(lambda: model.generate(prompts, max_new_tokens=4))
    seen["bad_prompt"] = refused(lambda: model.generate([[1] if number else []], max_new_tokens=4))
    seen["small_mesh"] = refused(lambda: Model.from_pretrained(folder / "model", mesh="expert=1"))

    exchange("all have read it")
    if number == 0:
        for file in (folder / "c").iterdir():
            (folder / "b" / file.name).write_bytes(file.read_bytes())
    exchange("it is another one")
    seen["changed"] = answers(model, NAMES)
    seen["on_the_host"] = float(np.abs(model.adapter("a").weights[0, "gate"].a).sum())
    slot = int(model.slots(["b"])[0])
    seen["scales"] = float(fetch(model.functional(4, 8).bank.scales["gate"])[:, slot].sum())
    report(**seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
