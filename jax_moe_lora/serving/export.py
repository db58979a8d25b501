"""The decode step as a file: saved with `jax.export`, run elsewhere without this library.

The exported program takes and returns flat lists of arrays; `Step.inputs` and `Step.outputs` name them. Parameters and
bank are arguments, so one file serves any adapters that are loaded into a bank of these sizes.

A user's own functions of a bank or of parameters are exported by `jax.export` itself, which keeps the tree of their
arguments. A process that reads such a file imports `jax_moe_lora.export` first: it makes the library's types known.

On a GPU: import `jax.experimental.pallas.mosaic_gpu` where the program runs; it tells the kernels where their runtime
library is. cuDNN's attention is no call that jax keeps stable: run the file with the jax version that wrote it, or
export a model made with `implementation="xla"`. XLA picks matmul kernels by timing them, so two processes give the same
bits where they share its choices: `XLA_FLAGS=--xla_gpu_per_fusion_autotune_cache_dir=DIR` in both.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from jax_moe_lora.arguments import whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.serving.functional import Functional
from pallas_kernels.backend import lowering_sms, target_sms


@dataclass(frozen=True)
class Step:
    """An exported step.

    Attributes:
      program: what `jax.export.deserialize` reads; its `call(*arrays)` returns the outputs in order.
      inputs: names of the arguments, such as `params.layers[0].mlp.router` and `cache.k[0]`.
      outputs: names of the results.
      sms: streaming multiprocessors of the GPU that the kernels are lowered for. The file says it too: the name of the
        exported function ends with it (`jax.export.deserialize(program).fun_name`).
    """

    program: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sms: int


def decode_arguments(fn: Functional, cache: Any, tokens: jax.Array, slots: jax.Array) -> list[jax.Array]:
    """The flat arrays of one decode step, in the order of `Step.inputs`.

    Args:
      fn: the model's functions and data.
      cache: the running cache.
      tokens: int32 `[B]`.
      slots: int32 `[B]`.
    """
    return jax.tree.leaves((fn.params, fn.bank, cache, tokens, slots))


def export_decode(fn: Functional, platforms: tuple[str, ...] | None = None, sms: int | None = None) -> Step:
    """Exports the decode step of `model.functional(batch, max_length)`; the cache is donated.

    Args:
      fn: the model's functions for one batch size.
      platforms: of the program, such as `("cuda",)`; that of the running process where None.
      sms: streaming multiprocessors of the GPU that will run the program. Where None: those of the default device, or
        132 (H100 SXM, H200) where that is no GPU. On a GPU with fewer, some blocks of a kernel wait for others, so the
        program is right and slower.

    Returns:
      The program, the names of its arrays, and the number of SMs.

    Raises:
      InputError: the model is on a mesh, or `sms` is not a positive whole number.
    """
    sms = target_sms() if sms is None else whole("sms", sms, 1)
    if any(len(leaf.sharding.device_set) > 1 for leaf in jax.tree.leaves(fn.params)):
        raise InputError("This model is split over a mesh; export the step of a model on one device.")
    cache = fn.init_cache()
    batch = cache.lengths.shape[0]
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    named = {"params": fn.params, "bank": fn.bank, "cache": cache, "tokens": rows, "slots": rows}
    leaves, tree = jax.tree.flatten(tuple(named.values()))

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(fn.decode(*jax.tree.unflatten(tree, arrays)))

    flat.__name__ = f"decode_step_for_{sms}_sms"
    inputs = _names(named)
    donated = tuple(index for index, name in enumerate(inputs) if name.startswith("cache."))
    step = jax.jit(flat, donate_argnums=donated)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    checks = [export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmax")]
    with lowering_sms(sms):
        exported = export.export(step, platforms=platforms, disabled_checks=checks)(*shapes)
    return Step(bytes(exported.serialize()), inputs, (*_names({"cache": cache}), "logits"), sms)


def _names(trees: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        name + jax.tree_util.keystr(path) for name, tree in trees.items() for path, _ in jax.tree.leaves_with_path(tree)
    )
