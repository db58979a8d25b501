"""The surface that most users touch: a checkpoint, adapters by name, and batches that mix them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.arguments import suggest_keywords, whole
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.dtypes import check_dtype
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.files.sizes import parse_bytes
from jax_moe_lora.mesh.processes import across, agreement, connect
from jax_moe_lora.mesh.rules import check_blocks, check_mesh, make_mesh, param_specs, shardings, split_sites
from jax_moe_lora.mesh.steps import init_cache, over_mesh, reachable, row_multiple
from jax_moe_lora.models import decoder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params, stored_formats
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.quantised.for_kernels import pack_experts, packed_format
from jax_moe_lora.models.quantised.schemes import quantised_formats
from jax_moe_lora.models.sites import select_sites
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving.chat import Chat
from jax_moe_lora.serving.functional import Functional, functions
from jax_moe_lora.serving.requests import check_tokens
from jax_moe_lora.serving.routing import padded_routing
from pallas_kernels.ops import Format, Implementation, Quantised, UnsupportedImplementation, choose

TokenIds = Sequence[Sequence[int]] | np.ndarray | Array


def _reading(step: Callable[..., Array]) -> Callable[..., Array]:
    """A step that reads whole prompts, as a program."""

    def read(*arguments: Any, mesh: Mesh | None, **static: Any) -> Array:
        return reachable(over_mesh(step, mesh)(*arguments, **static), mesh)

    return jax.jit(read, static_argnames=("config", "implementation", "mesh"))


_logits, _hidden = _reading(decoder.logits), _reading(decoder.hidden)


@suggest_keywords
class Model(Chat):
    """A Mixture-of-Experts model and the adapters that its requests use. Make one with `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str = "bfloat16",
        max_adapters: int = 8,
        max_rank: int = 64,
        adapter_memory: int | str = "4GiB",
        adapter_targets: Sequence[str] | Literal["all"] | None = None,
        max_replacements: int = 0,
        implementation: Implementation | None = None,
        mesh: str | Mesh | None = None,
        quantise: str | None = None,
    ) -> "Model":
        """Loads a checkpoint folder (or a hub id, where the hub is reachable) and makes an empty adapter bank.

        Weights that the checkpoint has in 8 or 4 bits stay so. On an H100 or H200 experts are packed for the Hopper
        kernels, where these have a form for them; all others are dequantised a tile at a time.

        Args:
          path: folder with `config.json` and safetensors files, or a hub id.
          dtype: of weights, cache and adapters: `bfloat16`, `float16` or `float32`.
          max_adapters: adapters that can be loaded at once.
          max_rank: the largest LoRA rank among them.
          adapter_memory: memory budget of the adapters on each device, in bytes or as text such as `"4GiB"`; no more
            is taken than they can use.
          adapter_targets: the modules that adapters may change, such as `["gate", "up", "down"]`. None is all modules
            of the layers. `"all"` adds `embedding` and `head`, whose pages are as wide as the vocabulary and are read
            in every step. The memory is for these modules alone, and an adapter that changes another one is refused.
          max_replacements: whole matrices in place of the model's embedding or head (`modules_to_save` of PEFT) that
            loaded adapters may bring, all of them together. Each takes `V * D` values out of `adapter_memory`, and as
            much to read in every step, whoever uses it.
          implementation: a backend by name, or None for the best that is available.
          mesh: the devices that the model is split over, such as `"data=2,expert=4"` (`mesh.rules.make_mesh`), or a
            mesh of jax; None for the default device.
          quantise: of a 16-bit checkpoint, the format that experts, attention and dense MLPs are quantised to while
            they are read: `fp8`, `mxfp4`, `int4` or `int4_g128`. None reads the weights as they are.

        Raises:
          ConfigError, CheckpointError: what is missing or not supported, by name. InputError: a bad argument, a width
            that the format does not divide, or a mesh that does not divide the model.
          DeviceError: jax has no device.
        """
        check_dtype(dtype)
        memory = parse_bytes(adapter_memory)
        max_adapters, max_rank = whole("max_adapters", max_adapters, 1), whole("max_rank", max_rank, 1)
        require_device()
        devices = make_mesh(mesh)
        folder = local_folder(path)
        config = read_model_config(folder)
        formats = {} if quantise is None else quantised_formats(config, quantise, folder)
        _check_implementation(implementation, config, dtype, _wanted_formats(formats, config, dtype, implementation))
        sites, vocabulary = select_sites(config, adapter_targets), (config.vocab_size, config.hidden_size)
        placement = None
        if devices is not None:
            _check_split(config, devices, max_replacements)
            check_blocks(config, devices, stored_formats(folder, config) if config.quantisation else formats)
            sites = split_sites(config, sites, devices)
            placement = shardings(param_specs(config, devices), devices)
        if devices is not None and across(devices):
            connect(devices)
        with agreement(devices).all_or_none(lambda: (config, sites, max_adapters, max_rank, memory, dtype)):
            bank = create_bank(sites, max_adapters, max_rank, memory, dtype, max_replacements, vocabulary, devices)
            params = load_params(folder, config, dtype, placement, formats)
            params = replace(params, layers=pack_experts(params.layers, dtype, implementation, max_adapters))
            _check_implementation(implementation, config, dtype, _expert_formats(params))
        return cls(config, params, bank, folder, implementation, devices)

    def __repr__(self) -> str:
        moe, slots = self.config.moe, self._pool.num_slots
        loaded = sorted(self.adapters)
        names = f": {', '.join(loaded[:8])}{', ...' if len(loaded) > 8 else ''}" if loaded else ""
        return (
            f"Model({self.config.model_type}, {self.config.num_layers} layers, {moe.num_experts} experts of which "
            f"{moe.top_k} per token, {self._dtype}, adapters in {len(loaded)} of {slots} slots{names})"
        )

    def logits(
        self,
        token_ids: TokenIds,
        adapter_names: Sequence[str | None] | None = None,
        lengths: Sequence[int] | None = None,
        routing: Sequence[Any] | np.ndarray | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits at every position of right-padded prompts.

        Args:
          token_ids: integers `[B, T]`.
          adapter_names: B names; `None` and `"__base__"` mean the base model.
          lengths: B numbers of real tokens, T where None; logits past them are undefined.
          routing: the experts of each token in place of those that the routers would choose, as `generate` returns
            them with `return_routing`: B arrays of integers `[tokens, L, K]` for L routed layers. The routers choose
            for tokens behind them.

        Returns:
          float32 `[B, T, V]`.

        Raises:
          InputError: shapes that disagree, or token ids or lengths out of range.
          AdapterNameError: an unknown adapter.
        """
        return self._read(_logits, token_ids, adapter_names, lengths, routing)

    def hidden(
        self,
        token_ids: TokenIds,
        adapter_names: Sequence[str | None] | None = None,
        lengths: Sequence[int] | None = None,
        routing: Sequence[Any] | np.ndarray | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head reads at every position of right-padded prompts: the rows after the last norm.

        Args:
          token_ids: integers `[B, T]`.
          adapter_names: B names; `None` and `"__base__"` mean the base model.
          lengths: B numbers of real tokens, T where None; rows past them are undefined.
          routing: as in `logits`.

        Returns:
          `[B, T, D]` in the model's dtype.

        Raises:
          InputError: shapes that disagree, or token ids or lengths out of range.
          AdapterNameError: an unknown adapter.
        """
        return self._read(_hidden, token_ids, adapter_names, lengths, routing)

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
        batch, multiple = whole("batch", batch, 1), row_multiple(self.mesh)
        if batch % multiple:
            raise InputError(f"batch is {batch}; expected a multiple of {multiple}, the mesh's data axis.")
        max_length = whole("max_length", max_length, 1, self.config.max_positions)
        steps = functions(self.config, self.implementation, self.mesh)
        bank, slots = self._pool.lend()
        empty = partial(init_cache, self.config, batch, max_length, self._dtype, self.mesh)
        return Functional(params=self.params, bank=bank, init_cache=empty, slot_names=slots, **vars(steps))

    def _read(
        self, program: Callable[..., Array], token_ids: Any, adapter_names: Any, lengths: Any, routing: Any
    ) -> Array:
        with self._agreement.all_or_none(lambda: (tokens.tolist(), real.tolist(), names, routing is None)):
            tokens, real = check_tokens(token_ids, lengths, self.config)
            chosen = () if routing is None else (jnp.asarray(padded_routing(routing, tokens.shape, self.config)),)
            names = self._names(adapter_names, len(tokens))
        with self.hold(names) as slots:
            return jax.block_until_ready(self._run(program, jnp.asarray(tokens), jnp.asarray(real), slots, *chosen))


def _check_split(config: ModelConfig, mesh: Mesh, max_replacements: int) -> None:
    """Refuses what cannot be split over these devices."""
    check_mesh(config, mesh)
    if max_replacements and across(mesh):
        raise InputError("max_replacements need the devices of one process; leave it at 0 with several.")


def _wanted_formats(
    formats: Mapping[str, Format], config: ModelConfig, dtype: str, implementation: Implementation | None
) -> set[Format]:
    """Those of experts that are to be quantised while they are read, with the layouts that they will have."""
    width, hidden = config.moe.expert_width, config.moe.hidden_size
    of_experts = [(path.rpartition(".")[2], format) for path, format in formats.items()]
    return {
        packed_format(format, *((hidden, width) if name == "down" else (width, hidden)), dtype, implementation)
        for name, format in of_experts
        if name in EXPERT_MODULES
    }


def _expert_formats(params: ModelParams) -> set[Format]:
    weights = [layer[name] for layer in params.layers for name in EXPERT_MODULES if name in layer]
    return {weight.format for weight in weights if isinstance(weight, Quantised)}


def _check_implementation(
    implementation: Implementation | None, config: ModelConfig, dtype: str, formats: Iterable[Format]
) -> None:
    """Refuses what the experts' matmuls cannot run now, not when the first batch is traced."""
    widths = config.moe.expert_width, config.moe.hidden_size
    try:
        choose(implementation, dtype=dtype, widths=widths, operands=tuple(dict.fromkeys(formats)))
    except UnsupportedImplementation as error:
        raise InputError(str(error)) from error
