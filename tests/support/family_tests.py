"""What every family of models promises, as a class of tests: against transformers and PEFT alone, in float32.

A family's file makes the fixture `served` of its cases, and a class of its name:

    @pytest.fixture(scope="module", params=CASES)
    def served(request, tmp_path_factory):
        return serve(CASES[request.param], tmp_path_factory.mktemp("family"))

    class TestGptOss(FamilyTests): ...

A family that brings a new kind of attention is tested by `AttentionTests` as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora import BASE_SLOT, Functional, Model
from jax_moe_lora.models import decoder
from jax_moe_lora.models.cache import Cache
from support.layers import assert_close
from support.networks import load_peft, save_model, save_random_adapter, tiny

LENGTH, DECODED = 80, 64
LIMIT = 1e-5
# Of the two best tokens: nearer ones may change places within float32's rounding.
CLEAR = 1e-4
FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""For programs that are compared within a tolerance: LLVM's optimisations are a third of their compilation."""
ALL_LINEAR: Mapping[str, Any] = {"r": 3, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Case:
    """One config of a family, and adapters for it.

    Attributes:
      model_type: of transformers.
      config: what differs from `networks.TINY` and `networks.FAMILIES`.
      adapters: name -> arguments of PEFT's `LoraConfig`.
      targets: `adapter_targets` of `Model.from_pretrained`.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"linear": ALL_LINEAR})
    targets: Any = None


@dataclass(frozen=True)
class Served:
    """A model with adapters, and a row of tokens for each of them.

    Attributes:
      base: the checkpoint.
      paths: the adapters by name, None for the base model.
      model: the model with all adapters loaded.
      fn: its functions.
      tokens: `[rows, LENGTH]`.
      expected: `[rows, LENGTH, V]`, by transformers and PEFT with the row's adapter alone.
      base_logits: the same without an adapter.
    """

    base: Path
    paths: Mapping[str | None, Path | None]
    model: Model
    fn: Functional
    tokens: np.ndarray
    expected: np.ndarray
    base_logits: np.ndarray

    @property
    def slots(self) -> jax.Array:
        return self.model.slots(list(self.paths))

    @cached_property
    def functions(self) -> Mapping[str, Callable[..., Any]]:
        """Prefill, decode and append of parameters, a bank or none, and the rest. The bits of prefill are compared."""
        options = {"prefill": None, "decode": FAST_COMPILE, "append": FAST_COMPILE}
        return {
            name: jax.jit(partial(getattr(decoder, name), config=self.model.config), compiler_options=options[name])
            for name in options
        }

    @cached_property
    def steps(self) -> Mapping[str, Callable[..., Any]]:
        """The functions with the model's parameters and bank."""
        return {name: partial(f, self.fn.params, self.fn.bank) for name, f in self.functions.items()}

    def cache(self) -> Cache:
        return decoder.init_cache(self.model.config, len(self.paths), LENGTH + 8, "float32")

    def after(self, lengths: np.ndarray) -> np.ndarray:
        """The logits that are expected after so many tokens of each row."""
        return self.expected[np.arange(len(self.paths)), lengths - 1]


def serve(case: Case, folder: Path) -> Served:
    """A saved random model and adapters, loaded, with what transformers and PEFT make of them."""
    import torch

    base = save_model(tiny(case.model_type, **case.config), folder / "model")
    paths: dict[str | None, Path | None] = {None: None}
    for seed, (name, config) in enumerate(case.adapters.items()):
        paths[name] = save_random_adapter(base, folder / name, seed, **config)
    model = Model.from_pretrained(
        base, dtype="float32", max_adapters=len(paths), max_rank=16, adapter_targets=case.targets
    )
    for name, path in paths.items():
        if name is not None:
            model.load_adapter(path, adapter_name=name)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (len(paths), LENGTH))
    with torch.no_grad():
        without = load_peft(base, None)(torch.tensor(tokens), use_cache=False).logits.numpy()
        expected = without.copy()
        for row, path in enumerate(paths.values()):
            if path is not None:
                own = load_peft(base, path)(torch.tensor(tokens[row, None]), use_cache=False)
                expected[row] = own.logits[0].numpy()
    fn = model.functional(batch=len(paths), max_length=LENGTH)
    return Served(base, paths, model, fn, tokens, expected, without)


class FamilyTests:
    """Each test has the fixture `served`."""

    def test_adapters_change_what_is_compared(self, served):
        for name, without, own in zip(served.paths, served.base_logits, served.expected, strict=True):
            if name is not None:
                assert np.linalg.norm(own - without) > 1e-2 * np.linalg.norm(without), name

    def test_prompts_of_all_lengths_equal_each_ones_own_run(self, served):
        found, expected = [], []
        for cut in range(0, LENGTH, 5):
            lengths = LENGTH - cut - np.arange(len(served.paths))
            logits = served.steps["prefill"](
                served.cache(), jnp.asarray(served.tokens), jnp.asarray(lengths), served.slots
            )[1]
            found.append(np.asarray(logits))
            expected.append(served.after(lengths))
        for row, name in enumerate(served.paths):
            own, theirs = (np.stack([step[row] for step in steps]) for steps in (found, expected))
            assert_close(own, theirs, LIMIT), name
            best_two = np.sort(theirs, axis=-1)[..., -2:]
            clear = best_two[..., 1] - best_two[..., 0] > CLEAR * np.abs(best_two[..., 1])
            assert clear.any()
            assert (own.argmax(-1) == theirs.argmax(-1))[clear].all()

    def test_decode_steps_equal_the_whole_prompts(self, served):
        lengths = LENGTH - DECODED - np.arange(len(served.paths))
        cache, logits = served.steps["prefill"](
            served.cache(), jnp.asarray(served.tokens), jnp.asarray(lengths), served.slots
        )
        assert_close(logits, served.after(lengths), LIMIT)
        rows = np.arange(len(lengths))
        for place in (lengths + step for step in range(DECODED)):
            cache, logits = served.steps["decode"](cache, jnp.asarray(served.tokens[rows, place]), served.slots)
            assert_close(logits, served.after(place + 1), LIMIT)


class AttentionTests:
    """What a kind of attention promises beside `FamilyTests`; each test has the fixture `served`."""

    def test_chunks_of_a_prompt_equal_the_whole(self, served):
        cache, read = served.cache(), np.zeros(len(served.paths), int)
        for count in (7, 1, 16, 3, 16, 15):  # padded to 16, each row another share of it
            lengths = np.maximum(count - np.arange(len(read)), 0)
            index = np.minimum(read[:, None] + np.arange(16), LENGTH - 1)
            tokens = np.take_along_axis(served.tokens, index, axis=1)
            cache, logits = served.steps["append"](cache, jnp.asarray(tokens), jnp.asarray(lengths), served.slots)
            read = read + lengths
            there = lengths > 0
            assert_close(np.asarray(logits)[there], served.after(np.maximum(read, 1))[there], LIMIT)

    def test_packed_examples_equal_each_alone(self, served):
        cut = LENGTH // 3
        positions = np.concatenate([np.arange(cut), np.arange(LENGTH - cut)])
        segments = np.concatenate([np.full(cut, 1), np.full(LENGTH - cut, 2)])
        rows = len(served.paths)
        others = np.roll(np.asarray(served.slots), 1)
        slots = np.where(segments[None] == 1, np.asarray(served.slots)[:, None], others[:, None])
        tokens = np.concatenate([served.tokens[:, :cut], np.roll(served.tokens, 1, axis=0)[:, : LENGTH - cut]], axis=1)
        run = jax.jit(partial(decoder.packed_logits, config=served.model.config), compiler_options=FAST_COMPILE)
        packed = run(
            served.fn.params,
            served.fn.bank,
            *map(jnp.asarray, (tokens, np.tile(positions, (rows, 1)), np.tile(segments, (rows, 1)), slots)),
        )
        assert_close(packed[:, :cut], served.expected[:, :cut], LIMIT)
        assert_close(packed[:, cut:], np.roll(served.expected, 1, axis=0)[:, : LENGTH - cut], LIMIT)

    def test_base_rows_are_exact_and_mixed_equals_solo(self, served):
        rows = np.arange(len(served.paths))
        tokens, lengths = jnp.asarray(served.tokens), jnp.asarray(LENGTH - rows)
        nobody = jnp.full(len(rows), BASE_SLOT, jnp.int32)
        run = served.steps["prefill"]
        mixed_cache, mixed = run(served.cache(), tokens, lengths, served.slots)
        _, base = run(served.cache(), tokens, lengths, nobody)
        _, no_bank = served.functions["prefill"](served.fn.params, None, served.cache(), tokens, lengths, nobody)
        assert (mixed[0] == no_bank[0]).all()
        assert (base == no_bank).all()
        for row in rows[1:]:
            solo_slots = jnp.where(jnp.asarray(rows) == row, served.slots, BASE_SLOT)
            solo_cache, solo = run(served.cache(), tokens, lengths, solo_slots)
            assert (solo[row] == mixed[row]).all()
            for one, other in zip(*map(jax.tree.leaves, (solo_cache, mixed_cache)), strict=True):
                assert (one[row] == other[row]).all()
