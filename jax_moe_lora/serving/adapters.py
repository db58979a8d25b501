"""The adapters of a model: loaded or registered by name, held while they run, unloaded, saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.formats.base_checkpoint import BaseCheckpoint
from jax_moe_lora.adapters.formats.detect import check_b_layout, read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.adapters.pool import AdapterInfo, AdapterPool, AdapterStatus
from jax_moe_lora.adapters.pool.agreement import Agreement, Alone
from jax_moe_lora.adapters.writing import write_adapter
from jax_moe_lora.arguments import array, flag, sequence, suggest_keywords
from jax_moe_lora.errors import AdapterInUseError, InputError
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.models import decoder
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.specs.model import ModelConfig


@suggest_keywords
class ServedAdapters:
    """What `Model` does with adapters."""

    def __init__(
        self, config: ModelConfig, bank: AdapterBank, folder: Path | None = None, agreement: Agreement | None = None
    ):
        self.config, self._folder, self._agreement = config, folder, agreement or Alone()
        self._pool = AdapterPool(bank, self._read_adapter, self._agreement)

    @property
    def folder(self) -> Path | None:
        """The checkpoint's folder; None for a model that was made in memory."""
        return self._folder

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The adapters that are in a slot, by name."""
        return {loaded.name: loaded for loaded in self._pool.loaded()}

    @property
    def adapter_status(self) -> dict[str, AdapterStatus]:
        """What every registered adapter is doing, by name."""
        return self._pool.statuses()

    def load_adapter(
        self, adapter: str | Path | LoRAAdapter, adapter_name: str, *, lora_b_layout: str | None = None
    ) -> AdapterInfo:
        """Loads an adapter under a name; it keeps its slot until it is unloaded.

        Nothing recompiles, running requests go on, and a failure leaves everything as it was.

        Args:
          adapter: a folder in any layout that `read_adapter` knows, or an adapter in memory.
          adapter_name: what requests call it.
          lora_b_layout: as for `read_adapter`.

        Returns:
          Its slot, ranks and bytes.

        Raises:
          AdapterFormatError: the files are not understood or do not fit.
          AdapterNameError: the name is taken or reserved.
          BankFullError: no slot or not enough pages are free.
        """
        self._register(adapter, adapter_name, True, lora_b_layout)
        try:
            self._pool.load(adapter_name)
            return self.adapters[adapter_name]
        except BaseException:
            with suppress(AdapterInUseError):  # interrupted, and the loader goes on
                self._pool.forget(adapter_name)
            raise

    def register_adapter(
        self, adapter: str | Path | LoRAAdapter, adapter_name: str, *, lora_b_layout: str | None = None
    ) -> None:
        """Makes an adapter known; the first request that names it loads it, and later ones may evict it.

        Any number can be registered. A folder whose content has changed is read again before the next request.

        Args:
          adapter: a folder, or an adapter in memory.
          adapter_name: what requests call it.
          lora_b_layout: as for `read_adapter`.

        Raises:
          AdapterNameError: the name is taken or reserved.
        """
        self._register(adapter, adapter_name, False, lora_b_layout)

    def prefetch_adapters(self, adapter_names: Sequence[str]) -> None:
        """Starts loading registered adapters into slots that nobody uses, without waiting.

        Args:
          adapter_names: their names.
        """
        self._pool.prefetch(sequence("adapter_names", adapter_names))

    def pin_adapter(self, adapter_name: str, pinned: bool = True) -> None:
        """Keeps a registered adapter in its slot once it is there, or lets it be evicted again.

        Args:
          adapter_name: its name.
          pinned: False lets it be evicted.
        """
        self._pool.pin(adapter_name, flag("pinned", pinned))

    def unload_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter and frees its slot.

        Args:
          adapter_name: its name.

        Raises:
          AdapterNameError: it is not registered, or is the base model.
          AdapterInUseError: it is loading, or a running request or `hold` uses it.
        """
        self._pool.forget(adapter_name)

    def adapter(self, adapter_name: str) -> LoRAAdapter:
        """A registered adapter on the host, to look at or compute with.

        Args:
          adapter_name: its name.

        Returns:
          What its folder holds, or the adapter that was registered. Where the folder is gone it comes from the bank, in
          the bank's dtype.

        Raises:
          AdapterNameError: no adapter of this name is registered.
          AdapterFormatError: its folder is not read, and it is in no slot.
        """
        return self._pool.fetch(adapter_name)

    def save_adapter(
        self, adapter: str | LoRAAdapter, folder: str | Path, layout: str = "peft", **options: Any
    ) -> list[str]:
        """Writes an adapter to a folder.

        Args:
          adapter: an adapter in memory, or a name: then what its source holds, or the bank where the source is gone.
          folder: where to.
          layout: as in `write_adapter`.
          **options: `expand`, `fold_scale` and `force`, as in `write_adapter`.

        Returns:
          Notes, as `write_adapter` gives them.

        Raises:
          AdapterNameError: the name is not registered.
          AdapterFormatError: the adapter cannot be written in this layout.
        """
        if not isinstance(adapter, LoRAAdapter):
            adapter = self.adapter(adapter)
        sites, names = decoder.adapter_sites(self.config), adapter_names(self.config)
        return write_adapter(adapter, folder, sites, names, layout, **options)

    @contextmanager
    def hold(self, adapter_names: Sequence[str | None]) -> Iterator[Int[Array, "B"]]:
        """`with model.hold(names) as slots:` loads adapters and keeps their slots theirs until the block ends.

        Meanwhile they cannot be unloaded or evicted. Waits for slots that running requests use.

        Args:
          adapter_names: B names; `None` and `"__base__"` mean the base model.

        Yields:
          int32 `[B]`, the slots, for `run` or `functional`.

        Raises:
          AdapterNameError: a name is not registered.
          AdapterFormatError: an adapter cannot be loaded.
          BankFullError: more adapters are named than there are slots to give, now or later.
        """
        with self._pool.hold(self._names(adapter_names)) as outcomes:
            for outcome in outcomes:
                if not isinstance(outcome, int):
                    raise outcome
            yield jnp.asarray(outcomes, jnp.int32)

    def acquire(self, adapter_names: Sequence[str | None]) -> Int[Array, "B"]:
        """`hold` for loops without a `with`: the slots stay theirs until `release`.

        Args:
          adapter_names: B names; `None` and `"__base__"` mean the base model.

        Returns:
          int32 `[B]`, the slots.

        Raises:
          AdapterNameError: a name is not registered.
          AdapterFormatError: an adapter cannot be loaded. Nothing is acquired then.
          BankFullError: more adapters are named than there are slots to give. A thread that holds slots already gets it
            in place of waiting for itself.
        """
        return jnp.asarray(self._pool.acquire(self._names(adapter_names)), jnp.int32)

    def release(self, slots: int | Sequence[int] | Int[Array, "B"]) -> None:
        """Gives back what `acquire` gave: all of its slots, or some of them, in any order and from any thread.

        Args:
          slots: one slot or several; `BASE_SLOT` is passed over. A slot that was acquired twice is released twice.

        Raises:
          InputError: a slot is not acquired, or fewer times than it is released. Nothing is released then.
        """
        values = array("slots", slots)
        if values.size and values.dtype.kind not in "iu":
            raise InputError(f"slots are {values.dtype}; expected whole numbers, as `acquire` returns them.")
        self._pool.release([int(slot) for slot in values.reshape(-1)])

    def slots(self, adapter_names: Sequence[str | None]) -> Int[Array, "B"]:
        """The slots of adapters at this moment, without holding them.

        Once an adapter is unloaded or evicted its slot may be given to another adapter, whose weights a program that
        still uses the slot would read. Where adapters come and go use `hold` or `acquire`; with the bank of a
        `Functional` use its own `slots`.

        Args:
          adapter_names: B names of adapters that are in a slot; `None` and `"__base__"` mean the base model.

        Returns:
          int32 `[B]`.

        Raises:
          AdapterNameError: a name is not registered, or its adapter is in no slot.
        """
        return jnp.asarray(self._pool.slots(self._names(adapter_names)), jnp.int32)

    def _names(self, adapter_names: Sequence[str | None] | None, count: int | None = None) -> list[str | None]:
        """One name for each prompt, all of them the base model's where None is given."""
        if adapter_names is None and count is not None:
            return [None] * count
        names = list(sequence("adapter_names", adapter_names))
        if count is not None and len(names) != count:
            raise InputError(f"adapter_names has {len(names)} entries for {count} prompts; give one for each.")
        return names

    def _register(self, adapter: str | Path | LoRAAdapter, name: str, pinned: bool, lora_b_layout: str | None) -> None:
        with self._agreement.all_or_none(lambda: (name, pinned, lora_b_layout)):
            check_b_layout(lora_b_layout)
            if lora_b_layout is not None and isinstance(adapter, LoRAAdapter):
                raise InputError("lora_b_layout says how a file is read; an adapter in memory has been read already.")
            source = adapter if isinstance(adapter, LoRAAdapter) else local_folder(adapter)
        self._pool.register(name, source, pinned, partial(self._read_adapter, lora_b_layout=lora_b_layout))

    def _read_adapter(self, folder: Path, name: str, lora_b_layout: str | None = None) -> LoRAAdapter:
        sites, names = decoder.adapter_sites(self.config), adapter_names(self.config)
        base = BaseCheckpoint.at(self._folder, self.config.tie_embeddings)
        return read_adapter(folder, sites, names, name, base=base, b_layout=lora_b_layout)
