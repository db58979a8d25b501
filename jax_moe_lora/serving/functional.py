"""The model as data and pure functions, for a loop of one's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.arguments import sequence
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import AdapterNameError
from jax_moe_lora.layer.checks import check_slots
from jax_moe_lora.models import decoder
from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.models.params import ModelParams
from pallas_kernels.ops import BASE_SLOT, Implementation

Step = Callable[..., tuple[Cache, Array]]


@dataclass(frozen=True)
class Functional:
    """The model as data and pure functions. Every one that takes a cache uses it up, and gives the next one back.

    Outside of `jit`, a slot that the bank does not have raises an `InputError`; inside, such a row is a base row.

    Attributes:
      params: the weights.
      bank: the adapters of the moment when this was made. It stays as it was: adapters that are loaded or unloaded
        later are not seen. `Model.run` calls a function with the bank of the moment instead.
      init_cache: `() -> cache`, an empty one.
      prefill: `(params, bank, cache, tokens [B, T], lengths [B], slots [B]) -> (cache, float32 logits [B, V])`.
      decode: `(params, bank, cache, tokens [B], slots [B]) -> (cache, float32 logits [B, V])`.
      slot_names: name -> slot of the bank's adapters.
    """

    params: ModelParams
    bank: AdapterBank
    init_cache: Callable[[], Cache]
    prefill: Step
    decode: Step
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


@dataclass(frozen=True)
class Functions:
    """The pure functions of a model. There is one set of them a process, so that nothing compiles twice."""

    prefill: Step
    decode: Step


@cache
def functions(config: ModelConfig, implementation: Implementation | None) -> Functions:
    """The functions of a config and a backend, always the same objects.

    Args:
      config: the model's.
      implementation: a backend by name, or None for the best available.
    """

    def jitted(step: Step) -> Step:
        return jax.jit(partial(step, config=config, implementation=implementation), donate_argnums=2)

    run_prefill, run_decode = jitted(decoder.prefill), jitted(decoder.decode)

    def prefill(params, bank, cache, tokens, lengths, slots):
        _check(bank, slots)
        return run_prefill(params, bank, cache, tokens, lengths, slots)

    def decode(params, bank, cache, tokens, slots):
        _check(bank, slots)
        return run_decode(params, bank, cache, tokens, slots)

    return Functions(prefill, decode)


def _check(bank: AdapterBank | None, slots: Array) -> None:
    check_slots(slots, 0 if bank is None else bank.num_slots)
