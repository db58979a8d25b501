"""The surface that most users touch: a checkpoint, adapters by name, and batches that mix them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_moe_lora import generate as programs
from jax_moe_lora.adapters.bank import AdapterBank, create_bank, insert, remove
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.adapters.pool import SlotRegistry
from jax_moe_lora.arguments import sequence, whole
from jax_moe_lora.checkpoint import load_params, read_model_config
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.hub import local_folder
from jax_moe_lora.models import decoder
from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.registry import family
from jax_moe_lora.requests import Batch, Generation, check_tokens, decode_loop, make_requests
from jax_moe_lora.text import TextStream, Tokenizer
from jax_moe_lora.units import parse_bytes
from pallas_kernels import Implementation, UnsupportedImplementation, choose

DTYPES = ("float32", "bfloat16", "float16")
_logits = jax.jit(decoder.logits, static_argnames=("config", "implementation"))


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: where it is and what it takes.

    Attributes:
      slot: its row in the bank's tables. ranks: module -> the ranks that occur in it.
      nbytes: device memory of its pages.
    """

    name: str
    slot: int
    ranks: dict[str, tuple[int, ...]]
    nbytes: int


@dataclass(frozen=True)
class Functional:
    """The model as data and pure functions, for a user's own `jax.jit`.

    `prefill(params, bank, cache, tokens [B, T], lengths [B], slots [B]) -> (cache, float32 logits [B, V])`;
    `decode(params, bank, cache, tokens [B], slots [B]) -> (cache, float32 logits [B, V])`. The cache may be donated.
    """

    params: ModelParams
    bank: AdapterBank
    init_cache: Callable[[], Cache]
    prefill: Callable[..., tuple[Cache, Array]]
    decode: Callable[..., tuple[Cache, Array]]


class Model:
    """A Mixture-of-Experts model and the adapters that its requests use. Make one with `from_pretrained`."""

    def __init__(
        self,
        config: ModelConfig,
        params: ModelParams,
        bank: AdapterBank,
        folder: Path | None = None,
        implementation: Implementation | None = None,
    ):
        self.config, self.params, self.implementation = config, params, implementation
        self._bank, self._folder = bank, folder
        self._registry = SlotRegistry(bank.num_slots)
        self._lock = threading.RLock()  # between taking the bank for a run and replacing it
        self._bank_is_lent = False  # `functional` gave it away, so its memory is not ours to reuse
        self._ranks: dict[str, dict[str, tuple[int, ...]]] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = "bfloat16",
        max_adapters: int = 8,
        max_rank: int = 64,
        adapter_memory: int | str = "4GiB",
        implementation: Implementation | None = None,
    ) -> "Model":
        """Loads a checkpoint folder (or a hub id, where the hub is reachable) and makes an empty adapter bank.

        Args:
          path: folder with `config.json` and safetensors files. dtype: of weights, cache and adapters.
          max_adapters, max_rank: adapters loaded at once, and the largest rank among them.
          adapter_memory: budget of the adapters, such as `"4GiB"`, or bytes; never more than they can use.

        Raises:
          ConfigError, CheckpointError: what is missing or not supported, by name. InputError: a bad argument.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        memory = parse_bytes(adapter_memory)
        max_adapters, max_rank = whole("max_adapters", max_adapters, 1), whole("max_rank", max_rank, 1)
        folder = local_folder(path)
        config = read_model_config(folder)
        _check_implementation(implementation, config, dtype)
        bank = create_bank(decoder.adapter_sites(config), max_adapters, max_rank, memory, dtype)
        return cls(config, load_params(folder, config, dtype), bank, folder, implementation)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self._folder is None:
            raise InputError("This model was made without a folder and has no tokenizer; pass token ids.")
        return Tokenizer(self._folder)

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name."""
        with self._lock:
            return {
                name: AdapterInfo(name, slot, self._ranks[name], self._bank.slot_nbytes(slot))
                for name, slot in self._registry.slots.items()
            }

    def load_adapter(self, adapter: str | Path | LoRAAdapter, adapter_name: str) -> AdapterInfo:
        """Loads an adapter folder under a name. Nothing recompiles, and a failure leaves everything as it was.

        Args:
          adapter: a folder in any layout that `read_adapter` knows, or an adapter in memory.

        Raises:
          AdapterFormatError: the files are not understood or do not fit. AdapterNameError: the name is taken or
          reserved. BankFullError: no slot or not enough pages are free.
        """
        slot = self._registry.reserve(adapter_name)
        try:
            if not isinstance(adapter, LoRAAdapter):
                names = family(self.config.model_type).ADAPTER_NAMES
                adapter = read_adapter(local_folder(adapter), decoder.adapter_sites(self.config), names, adapter_name)
            return self._insert(adapter, adapter_name, slot)
        except BaseException:
            self._registry.forget(adapter_name)
            raise

    def unload_adapter(self, adapter_name: str) -> None:
        """Frees an adapter's slot and pages. Raises AdapterInUseError while a running request holds it."""
        with self._lock:
            slot = self._registry.check_removable(adapter_name)
            self._change(lambda bank, donate: remove(bank, slot, donate))
            self._registry.forget(adapter_name)
            self._ranks.pop(adapter_name, None)

    def slots(self, adapter_names: Sequence[str | None]) -> Array:
        """int32 `[B]`: the slots of a batch's adapters, for `functional`."""
        return jnp.asarray(self._registry.find(sequence("adapter_names", adapter_names)), jnp.int32)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        adapter_names: Sequence[str | None] | None = None,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        callback: Callable[[int, int, str], None] | None = None,
        progress: bool = False,
        pad_to: tuple[int, int] | None = None,
    ) -> list[Generation]:
        """Answers a batch of prompts, each with its own adapter.

        Args:
          prompts: texts, or token ids. adapter_names: one for each prompt; `None` and `"__base__"` are the base model.
          max_new_tokens, temperature (0 is greedy), top_k (0 is off), top_p, seed: one value, or one a prompt.
          callback: called with (prompt's index, token id, new text) as tokens come; the joined texts are the answer.
            A character of several tokens comes with its last one, the rest of a broken one with the last of all.
          progress: show a progress bar. pad_to: (batch, prompt tokens) to pad to, instead of the smallest bucket: two
            batches padded alike run the same program.

        Raises:
          InputError: a bad argument or a prompt that is empty or too long. AdapterNameError: an unknown adapter.
        """
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        prompts = sequence("prompts", prompts)
        requests = make_requests(prompts, self._encode, self.config, **options, seed=seed)
        names = self._names(adapter_names, len(requests))
        if not requests:
            return []
        batch = Batch.make(requests, pad_to)
        with self._hold(names) as (slots, bank):
            cache = decoder.init_cache(self.config, batch.rows, batch.cache_length, self._dtype)
            static: dict[str, Any] = {"config": self.config, "implementation": self.implementation}
            tokens_of = decode_loop(
                batch,
                partial(programs.start, self.params, bank, cache, **static),
                partial(programs.advance, self.params, bank, **static),
                batch.pad_slots(slots),
                self.config.eos_token_ids,
                callback and self._streamer(callback),
                progress,
            )
        return [
            Generation(self._decode(ids), ids, None if name == "__base__" else name, reason)
            for (ids, reason), name in zip(tokens_of, names, strict=True)
        ]

    def logits(
        self,
        token_ids: Sequence[Sequence[int]] | np.ndarray | Array,
        adapter_names: Sequence[str | None] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits at every position of right-padded prompts.

        Args:
          token_ids: integers `[B, T]`. lengths: real tokens of each row, T where None; logits past them mean nothing.
        """
        tokens, real = check_tokens(token_ids, lengths, self.config)
        with self._hold(self._names(adapter_names, len(tokens))) as (slots, bank):
            return _logits(
                self.params,
                bank,
                jnp.asarray(tokens),
                jnp.asarray(real),
                jnp.asarray(slots, jnp.int32),
                config=self.config,
                implementation=self.implementation,
            )

    def functional(self, batch: int, max_length: int) -> Functional:
        """Parameters, bank and pure functions for `batch` requests of at most `max_length` tokens each.

        The bank is the one of this moment: after loading or unloading an adapter, take the new one.

        Raises:
          InputError: a size that is no whole number, or a length that the model has no positions for.
        """
        batch = whole("batch", batch, 1)
        max_length = whole("max_length", max_length, 1, self.config.max_positions)
        with self._lock:
            self._bank_is_lent = True
            bank = self._bank
        static: dict[str, Any] = {"config": self.config, "implementation": self.implementation}
        return Functional(
            params=self.params,
            bank=bank,
            init_cache=partial(decoder.init_cache, self.config, batch, max_length, self._dtype),
            prefill=partial(decoder.prefill, **static),
            decode=partial(decoder.decode, **static),
        )

    @contextmanager
    def _hold(self, names: Sequence[str | None]) -> Iterator[tuple[list[int], AdapterBank]]:
        """The slots of a batch and the bank of this moment; neither changes until the block ends."""
        with ExitStack() as stack:
            with self._lock:
                slots, bank = stack.enter_context(self._registry.hold(names)), self._bank
            yield slots, bank

    def _insert(self, adapter: LoRAAdapter, name: str, slot: int) -> AdapterInfo:
        """Puts an adapter into its reserved slot; requests find its name once its pages are there."""
        with self._lock:
            self._change(lambda bank, donate: insert(bank, slot, adapter, donate))
            self._ranks[name] = adapter.ranks
            self._registry.publish(name)
            return self.adapters[name]

    def _change(self, change: Callable[[AdapterBank, bool], AdapterBank]) -> None:
        """Replaces the bank, in place where nobody else holds it."""
        with self._lock:
            self._bank = change(self._bank, self._registry.idle and not self._bank_is_lent)
            self._bank_is_lent = False

    @property
    def _dtype(self) -> np.dtype:
        return self.params.embedding.dtype

    def _names(self, adapter_names: Sequence[str | None] | None, count: int) -> list[str | None]:
        names = [None] * count if adapter_names is None else list(sequence("adapter_names", adapter_names))
        if len(names) != count:
            raise InputError(f"adapter_names has {len(names)} entries for {count} prompts; give one for each.")
        return names

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "" if self._folder is None else self.tokenizer.decode(token_ids)

    def _streamer(self, callback: Callable[[int, int, str], None]) -> Callable[[int, int, list[int], bool], None]:
        texts = TextStream(self._decode)

        def stream(index: int, token: int, so_far: list[int], last: bool) -> None:
            new_text = texts.take(index, so_far, last)
            if new_text or token not in self.config.eos_token_ids:
                callback(index, token, new_text)

        return stream


def _check_implementation(implementation: Implementation | None, config: ModelConfig, dtype: str) -> None:
    """Refuses what the experts' matmuls cannot run now, not when the first batch is traced."""
    try:
        moe = config.moe
        widths = (moe.expert_width, moe.hidden_size)
        choose(implementation, dtype=dtype, widths=widths, activation=moe.activation, biases=moe.expert_bias)
    except UnsupportedImplementation as error:
        raise InputError(str(error)) from error
