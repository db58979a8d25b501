"""A checkpoint with adapters on one device and on meshes: answers, hot loading, a loop of one's own, what is read."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora import InputError, Model
from jax_moe_lora.export import export_decode
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.tools.compilations import count_compilations
from support.checkpoints import write
from support.meshes import random_adapter, relative, report
from support.read_parts import count_what_is_read

CHANGES = {"num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 16, "head_dim": 4, "hidden_size": 32}
NAMES = [None, "a", "b", "a", None]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8], [9, 10], [4, 5, 6, 7]]
TOKENS = np.random.default_rng(1).integers(0, 32, (5, 6)).astype(np.int32)


def load(folder: Path, mesh: str | None) -> Model:
    model = Model.from_pretrained(folder, dtype="float32", max_adapters=2, max_rank=32, mesh=mesh)
    for name, seed in (("a", 0), ("b", 1)):
        model.load_adapter(random_adapter("shared_outer", layer_sites(model.config), seed), name)
    return model


def answers(model: Model, names: list[str | None] = NAMES) -> list[list[int]]:
    outs = model.generate(PROMPTS, names, max_new_tokens=4, ignore_eos=True)
    return [out.token_ids for out in outs]


def own_loop(model: Model) -> np.ndarray:
    """A prompt joins a running cache, which goes on; another one grows."""
    fn = model.functional(batch=4, max_length=16)
    slots = fn.slots(["a", None, "b", "a"])
    lengths = jnp.array([4, 3, 0, 2], jnp.int32)
    cache, first = fn.prefill(fn.params, fn.bank, fn.init_cache(), TOKENS[:4], lengths, slots)
    row = jnp.array([2], jnp.int32)
    cache, joined = fn.insert_rows(fn.params, fn.bank, cache, row, TOKENS[4:5], jnp.array([5], jnp.int32), slots[2:3])
    cache, grown = fn.append_rows(
        fn.params, fn.bank, cache, row, TOKENS[3:4, :2], jnp.array([2], jnp.int32), slots[2:3]
    )
    cache, last = fn.decode(fn.params, fn.bank, cache, jnp.asarray(TOKENS[:4, 5]), slots)
    return np.concatenate((first[:2], first[3:], joined, grown, last))


def hot_loading(model: Model) -> dict[str, object]:
    """Adapters come and go, and nothing is compiled; in another slot an adapter gives the same answers."""
    before = answers(model)
    own_loop(model)
    with count_compilations() as count:
        own_loop(model)
        model.unload_adapter("a")
        model.unload_adapter("b")
        model.load_adapter(random_adapter("shared_outer", layer_sites(model.config), 1), "b")
        model.load_adapter(random_adapter("shared_outer", layer_sites(model.config), 0), "a")
        after = answers(model)
    return {"compilations": count.compilations, "same_after_reloading": before == after}


def refused(call) -> str:
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


def parts(model: Model) -> dict[str, float]:
    """The share of the model and of the bank that the first device has."""

    def share(tree: object) -> float:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 1]
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        return here / sum(leaf.nbytes for leaf in leaves)

    routed = [layer for layer in model.params.layers if "gate" in layer]
    experts = [layer[name] for layer in routed for name in ("gate", "up", "down")]
    bank = model.functional(2, 4).bank
    pages = [pool for width, pool in bank.pages.items() if getattr(width, "regions", 1) > 1]
    return {"experts": share(experts), "pages": share(pages)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    written = sum(tensor.nbytes for tensor in write(folder, **CHANGES).values())
    read = count_what_is_read()
    one = load(folder, None)
    logits, wanted, loop = one.logits(TOKENS, NAMES), answers(one), own_loop(one)
    for number, mesh in enumerate(sys.argv[2:]):
        read.clear()
        model = load(folder, mesh)
        bytes_read = read[folder.name]
        whole = (
            {}
            if number
            else {
                "loop": relative(own_loop(model), loop),
                "export": refused(lambda model=model: export_decode(model.functional(4, 16))),
                **hot_loading(model),
            }
        )
        report(
            mesh=mesh,
            error=relative(model.logits(TOKENS, NAMES), logits),
            answers=answers(model) == wanted,
            read_once=[bytes_read, written],
            parts=parts(model),
            **whole,
        )
