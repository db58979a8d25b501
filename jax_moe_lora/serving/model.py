"""The surface that most users touch: a checkpoint, adapters by name, and batches that mix them."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_moe_lora.adapters.bank import AdapterBank, create_bank
from jax_moe_lora.arguments import flag, sequence, whole
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.files.dtypes import check_dtype
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.files.sizes import parse_bytes
from jax_moe_lora.files.tokenizer import TextStream, Tokenizer
from jax_moe_lora.models import decoder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.serving import programs
from jax_moe_lora.serving.adapters import ServedAdapters
from jax_moe_lora.serving.functional import Functional, functions
from jax_moe_lora.serving.requests import Generation, PaddedBatch, check_tokens, decode_loop, make_requests
from pallas_kernels.ops import BASE_SLOT, Implementation, UnsupportedImplementation, choose

Result = TypeVar("Result")
_logits = jax.jit(decoder.logits, static_argnames=("config", "implementation"))


class Model(ServedAdapters):
    """A Mixture-of-Experts model and the adapters that its requests use. Make one with `from_pretrained`."""

    def __init__(
        self,
        config: ModelConfig,
        params: ModelParams,
        bank: AdapterBank,
        folder: Path | None = None,
        implementation: Implementation | None = None,
    ):
        super().__init__(config, bank, folder)
        self.params, self.implementation = params, implementation
        self._compiled: set[Any] = set()

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
          path: folder with `config.json` and safetensors files, or a hub id.
          dtype: of weights, cache and adapters: `bfloat16`, `float16` or `float32`.
          max_adapters: adapters that can be loaded at once.
          max_rank: the largest LoRA rank among them.
          adapter_memory: memory budget of the adapters, in bytes or as text such as `"4GiB"`; no more is taken than
            they can use.
          implementation: a backend by name, or None for the best that is available.

        Raises:
          ConfigError, CheckpointError: what is missing or not supported, by name. InputError: a bad argument.
          DeviceError: jax has no device.
        """
        check_dtype(dtype)
        memory = parse_bytes(adapter_memory)
        max_adapters, max_rank = whole("max_adapters", max_adapters, 1), whole("max_rank", max_rank, 1)
        require_device()
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

    @cached_property
    def _has_tokenizer(self) -> bool:
        """Without one, prompts of token ids are answered with token ids alone."""
        try:
            return self.tokenizer is not None
        except (InputError, CheckpointError):
            return False

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
        adapter_errors: Literal["raise", "return"] = "raise",
    ) -> list[Generation]:
        """Answers a batch of prompts, each with its own adapter.

        Sampling options are one value for all prompts, or one per prompt.

        Args:
          prompts: texts, or token ids.
          adapter_names: one per prompt; `None` and `"__base__"` mean the base model.
          max_new_tokens: limit of the answer, in tokens.
          temperature: of sampling; 0 is greedy.
          top_k: sample from the k most likely tokens; 0 is off.
          top_p: sample from the most likely tokens that together have this probability; 1 is off.
          seed: of sampling.
          callback: called with (index of the prompt, token id, new text) as tokens arrive; the joined texts are the
            answer. A character of several tokens arrives with its last token, an incomplete one with the last of all.
          progress: show a progress bar.
          pad_to: (batch, prompt tokens) to pad to, in place of the smallest bucket. Two batches that are padded alike
            run the same program.
          adapter_errors: what to do when an adapter cannot be loaded, such as a corrupt file. `raise`: no prompt is
            answered. `return`: only the requests that named it get the `error`, and no tokens.

        Raises:
          InputError: a bad argument or a prompt that is empty or too long. AdapterNameError: an unknown adapter.
          BankFullError: the batch names more adapters than there are slots that are not pinned.
        """
        if adapter_errors not in ("raise", "return"):
            raise InputError(f"adapter_errors is {adapter_errors!r}; expected 'raise' or 'return'.")
        if callback is not None and not callable(callback):
            raise InputError(f"callback is of type {type(callback).__name__}; expected a function.")
        progress = flag("progress", progress)
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        prompts = sequence("prompts", prompts)
        requests = make_requests(prompts, self._encode, self.config, **options, seed=seed)
        names = self._names(adapter_names, len(requests))
        if not requests:
            return []
        batch = PaddedBatch.make(requests, pad_to)
        with self._pool.hold(names) as outcomes:
            slots, failed = _sort_out(outcomes, adapter_errors)
            cache = decoder.init_cache(self.config, batch.rows, batch.cache_length, self._dtype)
            tokens_of = decode_loop(
                batch,
                partial(self._run, programs.start, cache),
                partial(self._run, programs.advance),
                batch.pad_slots(slots),
                self.config.eos_token_ids,
                callback and self._streamer(callback),
                progress,
                failed,
            )
        return [
            Generation(self._decode(ids), ids, None if name == "__base__" else name, reason, failed.get(index))
            for index, ((ids, reason), name) in enumerate(zip(tokens_of, names, strict=True))
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
        with self._pool.hold(self._names(adapter_names, len(tokens))) as outcomes:
            slots, _ = _sort_out(outcomes, "raise")
            arguments = (jnp.asarray(tokens), jnp.asarray(real), jnp.asarray(slots, jnp.int32))
            return jax.block_until_ready(self._run(_logits, *arguments))

    def functional(self, batch: int, max_length: int) -> Functional:
        """Parameters, bank and pure functions for `batch` requests of at most `max_length` tokens each.

        The bank is the one of this moment, and stays as it is, at the cost of a copy with the next change of the
        adapters. A loop in which adapters come and go calls the functions through `run`, with slots that it holds.
        Models of one config have the same functions: asking again compiles nothing.

        Args:
          batch: rows of the cache.
          max_length: positions of the cache, prompt and answer together.

        Raises:
          InputError: a size that is not a whole number, or a length that the model has no positions for.
        """
        batch = whole("batch", batch, 1)
        max_length = whole("max_length", max_length, 1, self.config.max_positions)
        steps = functions(self.config, self.implementation)
        bank, slots = self._pool.lend()
        init_cache = partial(decoder.init_cache, self.config, batch, max_length, self._dtype)
        return Functional(self.params, bank, init_cache, steps.prefill, steps.decode, slots)

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(params, bank, *arguments)` with the bank of this moment, for a loop in which adapters come and go.

        Slots are right in it as long as they are held. Loads wait while the function is compiled for new shapes.

        Args:
          function: one of `functional`, or a jitted function of your own; the same object each time.
          *arguments: what follows the bank.

        Returns:
          What the function returns.
        """
        return self._dispatch(function, function, arguments)

    def _run(self, program: Callable[..., Result], *arguments: Any) -> Result:
        call = partial(program, config=self.config, implementation=self.implementation)
        return self._dispatch(program, call, arguments)

    def _dispatch(self, key: Any, call: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        """Starts a program with the bank of this moment; while it is compiled, other requests go on."""
        key = key, jax.tree.structure(arguments), *(np.shape(x) for x in jax.tree.leaves(arguments))
        start = self._pool.using if key in self._compiled else self._pool.pausing_loads
        result = start(lambda bank: call(self.params, bank, *arguments))
        self._compiled.add(key)
        return result

    @property
    def _dtype(self) -> np.dtype:
        return self.params.embedding.dtype

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids) if self._has_tokenizer else ""

    def _streamer(self, callback: Callable[[int, int, str], None]) -> Callable[[int, int, list[int], bool], None]:
        texts = TextStream(self._decode)

        def stream(index: int, token: int, so_far: list[int], last: bool) -> None:
            new_text = texts.take(index, so_far, last)
            if new_text or token not in self.config.eos_token_ids:
                callback(index, token, new_text)

        return stream


def _sort_out(outcomes: Sequence[int | Exception], adapter_errors: str) -> tuple[list[int], dict[int, Exception]]:
    """The slot of each request, and by its index why one has none; such a row is a base row that nobody reads."""
    failed = {index: slot for index, slot in enumerate(outcomes) if isinstance(slot, Exception)}
    if failed and adapter_errors == "raise":
        raise next(iter(failed.values()))
    return [BASE_SLOT if isinstance(slot, Exception) else slot for slot in outcomes], failed


def _check_implementation(implementation: Implementation | None, config: ModelConfig, dtype: str) -> None:
    """Refuses what the experts' matmuls cannot run now, not when the first batch is traced."""
    try:
        choose(implementation, dtype=dtype, widths=(config.moe.expert_width, config.moe.hidden_size))
    except UnsupportedImplementation as error:
        raise InputError(str(error)) from error
