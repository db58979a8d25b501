"""A model's programs: run with its parameters, and with the adapter bank of the moment."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.arguments import suggest_keywords
from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.mesh.processes import agreement, everywhere
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving.adapters import ServedAdapters
from jax_moe_lora.serving.requests import fresh_seeds
from pallas_kernels.ops import Implementation

Result = TypeVar("Result")


@suggest_keywords
class ProgramRunner(ServedAdapters):
    """What `Model` runs its programs with."""

    def __init__(
        self,
        config: ModelConfig,
        params: ModelParams,
        bank: AdapterBank,
        folder: Path | None = None,
        implementation: Implementation | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        super().__init__(config, bank, folder, agreement(mesh))
        self.params, self.implementation, self.mesh = params, implementation, mesh
        self._fresh_seed = fresh_seeds(self._agreement)
        self._compiled: set[Any] = set()

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

    def _run(self, program: Callable[..., Result], *arguments: Any, **static: Any) -> Result:
        call = partial(program, config=self.config, implementation=self.implementation, mesh=self.mesh, **static)
        return self._dispatch((program, *static.values()), call, arguments)

    def _dispatch(self, key: Any, call: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        """Starts a program with the bank of this moment; while it is compiled, other requests go on."""
        arguments = everywhere(arguments, self.mesh)
        key = key, jax.tree.structure(arguments), *(np.shape(x) for x in jax.tree.leaves(arguments))
        start = self._pool.using if key in self._compiled else self._pool.pausing_loads
        result = start(lambda bank: call(self.params, bank, *arguments))
        self._compiled.add(key)
        return result

    @property
    def _dtype(self) -> np.dtype:
        return self.params.embedding.dtype
