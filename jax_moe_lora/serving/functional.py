"""The model as data and pure functions, for a loop of one's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.arguments import sequence
from jax_moe_lora.errors import AdapterNameError
from jax_moe_lora.layer.checks import check_slots
from jax_moe_lora.mesh.processes import everywhere
from jax_moe_lora.mesh.steps import over_mesh, reachable, split_cache
from jax_moe_lora.models import cache_rows, decoder
from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving.kept_programs import keeps, kept
from jax_moe_lora.serving.loop_checks import check_cache, check_prompts, check_room, check_rows
from pallas_kernels.ops import BASE_SLOT, Implementation

CacheStep = Callable[..., tuple[Cache, Array]]


@dataclass(frozen=True, kw_only=True)
class CacheFunctions:
    """The pure functions of `Functional`. There is one set per config and backend, so that nothing compiles twice."""

    prefill: CacheStep
    decode: CacheStep
    insert_rows: CacheStep
    append_rows: CacheStep
    free_rows: Callable[[Cache, Array], Cache]


@dataclass(frozen=True, kw_only=True)
class Functional(CacheFunctions):
    """The model as data and pure functions. Every one that takes a cache uses it up, and gives the next one back.

    Outside of `jit`, an `InputError` names a used-up cache, rows that it does not have, lengths that do not fit, ids of
    prompts that the vocabulary lacks, and slots that the bank lacks. Inside, a row with such a slot is a base row.

    Attributes:
      params: the weights.
      bank: the adapters of the moment when this was made. It stays as it was: adapters that are loaded or unloaded
        later are not seen. `Model.run` calls a function with the bank of the moment instead.
      init_cache: `() -> cache`, an empty one.
      prefill: `(params, bank, cache, tokens [B, T], lengths [B], slots [B]) -> (cache, float32 logits [B, V])`.
      decode: `(params, bank, cache, tokens [B], slots [B]) -> (cache, float32 logits [B, V])`.
      insert_rows: `(params, bank, cache, rows [N], tokens [N, T], lengths [N], slots [N]) -> (cache, float32 logits
        [N, V])`: prompts join a running cache, whose other rows go on.
      append_rows: as `insert_rows`, behind what the rows hold: the next chunk of a long prompt, or of a conversation.
      free_rows: `(cache, rows [N]) -> cache`. A free row costs nothing in the experts.
      slot_names: name -> slot of the bank's adapters.
    """

    params: ModelParams
    bank: AdapterBank
    init_cache: Callable[[], Cache]
    slot_names: Mapping[str, int] = field(default_factory=dict)

    def slots(self, adapter_names: Sequence[str | None]) -> Int[Array, "B"]:
        """The slots that adapters have in `bank`, whatever was loaded or unloaded since.

        Args:
          adapter_names: B names; `None` and `"__base__"` mean the base model.

        Returns:
          int32 `[B]`.

        Raises:
          AdapterNameError: the bank does not have an adapter of this name.
        """
        known = {None: BASE_SLOT, "__base__": BASE_SLOT, **self.slot_names}
        names = list(sequence("adapter_names", adapter_names))
        for name in names:
            if name not in known:
                has = ", ".join(sorted(self.slot_names)) or "none"
                raise AdapterNameError(f"No adapter named {name!r} is in this bank (there are: {has}).")
        return jnp.asarray([known[name] for name in names], jnp.int32)


@cache
def functions(config: ModelConfig, implementation: Implementation | None, mesh: Mesh | None = None) -> CacheFunctions:
    """The functions of a config and a backend, always the same objects.

    Args:
      config: the model's.
      implementation: a backend by name, or None for the best available.
      mesh: the devices that the model is split over; None for the default one.
    """

    def jitted(step: CacheStep, name: str) -> CacheStep:
        options = {"config": config, "implementation": implementation}
        plain = jax.jit(partial(_with_whole_logits(step, mesh), **options), donate_argnums=2)

        @partial(jax.jit, donate_argnums=2)
        def of_a_file(*arrays):
            return kept(step, name, arrays, mesh=mesh, **options)

        def run(params, bank, *arguments):
            arrays = params, bank, *everywhere(arguments, mesh)
            return (of_a_file if keeps(mesh) and not _traced(arrays) else plain)(*arrays)

        return run

    def of_rows(step: CacheStep, read: CacheStep) -> CacheStep:
        def changed(*arguments, **static):
            cache, logits = step(*arguments, read=over_mesh(read, mesh), **static)
            return split_cache(cache, config, mesh), logits

        run = jitted(changed, step.__name__)

        def call(params, bank, cache, rows, tokens, lengths, slots):
            check_cache(cache)
            check_rows(cache, rows)
            check_prompts(tokens, lengths, rows.shape[0], config.vocab_size)
            _check(bank, slots)
            check_room(cache, rows, lengths, step is cache_rows.append_rows)
            return run(params, bank, cache, rows, tokens, lengths, slots)

        return call

    run_prefill, run_decode = (
        jitted(over_mesh(step, mesh), step.__name__) for step in (decoder.prefill, decoder.decode)
    )
    free = jax.jit(cache_rows.free_rows, donate_argnums=0)

    def prefill(params, bank, cache, tokens, lengths, slots):
        check_cache(cache)
        check_prompts(tokens, lengths, cache.lengths.shape[0], config.vocab_size)
        _check(bank, slots)
        return run_prefill(params, bank, cache, tokens, lengths, slots)

    def decode(params, bank, cache, tokens, slots):
        check_cache(cache)
        _check(bank, slots)
        return run_decode(params, bank, cache, tokens, slots)

    def free_rows(cache, rows):
        check_cache(cache)
        check_rows(cache, rows)
        return free(cache, everywhere(rows, mesh))

    return CacheFunctions(
        prefill=prefill,
        decode=decode,
        insert_rows=of_rows(cache_rows.insert_rows, decoder.prefill),
        append_rows=of_rows(cache_rows.append_rows, decoder.append),
        free_rows=free_rows,
    )


def _traced(arrays: Any) -> bool:
    """Whether the arrays are those of somebody's `jit`, `grad` or `vmap`: a kept program has no gradient."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays))


def _check(bank: AdapterBank | None, slots: Array) -> None:
    check_slots(slots, 0 if bank is None else bank.num_slots)


def _with_whole_logits(step: CacheStep, mesh: Mesh | None) -> CacheStep:
    """A step whose logits every process has, where the mesh has several."""

    @wraps(step)
    def run(*arguments, **static):
        cache, logits = step(*arguments, **static)
        return cache, reachable(logits, mesh)

    return run
