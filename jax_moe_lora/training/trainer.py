"""Training of many adapters at once on one frozen model, from JSONL to adapter folders."""

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.adapters.writing import plan_adapter, write_adapter
from jax_moe_lora.arguments import sequence, whole
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.dtypes import TRAINING_NAMES, check_dtype
from jax_moe_lora.files.folders import writing_to
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.training.adapters import init_params, to_adapter
from jax_moe_lora.training.checkpoint import Checkpoints
from jax_moe_lora.training.data import Encoder, Lines, read_datasets
from jax_moe_lora.training.log import Log, Progress
from jax_moe_lora.training.recipe import Recipe, recipes_of
from jax_moe_lora.training.rows import Rows, lay_out, make_feed, whole_batches
from jax_moe_lora.training.run_folder import CHECKPOINTS, METRICS, MetricsFile, run_folder
from jax_moe_lora.training.scoring import Evaluation, evaluate, make_scoring
from jax_moe_lora.training.spec import WRITTEN_AS, check_layout
from jax_moe_lora.training.step import Metrics, TrainState, init_state, make_step
from pallas_kernels.ops import Implementation

Source = str | Path | Sequence[Mapping[str, str]]
"""A JSONL file, or the objects of its lines."""

LOG_EVERY = 10  # steps
RESERVED = (CHECKPOINTS, METRICS, "__base__")  # names that an adapter cannot have
RESUME = "once it can, go on with --resume"
EMPTY: Mapping[str, Any] = {}


class Trainer:
    """Adapters that are trained together: each batch holds rows of all of them, and none sees the others' examples."""

    def __init__(
        self,
        model: str | Path,
        data: Mapping[str, Source],
        *,
        steps: int,
        recipe: Recipe | Mapping[str, Recipe] | None = None,
        evaluation: Mapping[str, Source] = EMPTY,
        batch_size: int = 8,
        micro_batches: int = 1,
        sequence_length: int | None = None,
        packing: bool = True,
        router_loss: float = 0.0,
        seed: int = 0,
        dtype: str = "bfloat16",
        skip_bad_lines: bool = False,
        implementation: Implementation | None = None,
    ):
        """Checks everything, reads the data and then the model.

        Args:
          model: checkpoint folder, or a hub id.
          data: adapter -> a JSONL file, or the objects of its lines, each `{"prompt", "completion"}` or `{"text"}`.
          steps: updates of every adapter.
          recipe: one for all adapters, or one for each.
          evaluation: held-out data like `data`, for some of the adapters.
          batch_size: rows per update, at least one per adapter; the adapters take turns.
          micro_batches: parts of a batch that are computed one after the other.
          sequence_length: tokens per row; None is 512, or the model's positions where they are fewer.
          packing: put several examples into a row.
          router_loss: coefficient of the load-balancing loss.
          seed: of the initial weights and the order of the examples.
          dtype: of the frozen model, float32 or bfloat16; adapters and their optimizers are float32.
          skip_bad_lines: leave out lines that cannot be trained on; they are counted in `skipped`.
          implementation: a backend by name, or None for the best that is available.

        Raises:
          InputError: a bad argument, or lines that cannot be trained on, all of them at once.
          ConfigError: the model's config is not supported.
          CheckpointError: the model's files are missing or corrupt.
          DeviceError: jax has no device.
        """
        _check_names(data, evaluation)
        self.steps, self.seed = whole("steps", steps, 1), whole("seed", seed, 0)
        self.batch_size, self.packing = whole("batch_size", batch_size, 1), packing
        self.micro_batches = _parts(self.batch_size, micro_batches, len(data))
        _check_dtype(dtype)
        require_device()
        folder = local_folder(model)
        self.config, self._source = read_model_config(folder), str(model)
        self.width = _width(sequence_length, self.config.max_positions)
        self.sites, self.recipes = adapter_sites(self.config), recipes_of(recipe, data)
        for name, one in self.recipes.items():
            one.check(name, self.sites, self.steps)
        self.specs = {name: one.spec for name, one in self.recipes.items()}
        self._schedules = {name: one.schedule_of(self.steps) for name, one in self.recipes.items()}
        self._optimizers = {name: one.optimizer(self.steps) for name, one in self.recipes.items()}
        self._step = make_step(
            self.config,
            self.specs,
            self._optimizers,
            clip={name: one.clip for name, one in self.recipes.items()},
            router_loss=router_loss,
            micro_batches=self.micro_batches,
            implementation=implementation,
        )
        self._router_loss, self._implementation = router_loss, implementation
        self._score = make_scoring(self.config, self.specs, implementation)
        self._read_data(folder, data, evaluation, skip_bad_lines)
        self.params = load_params(folder, self.config, dtype)
        self.state, self.step = self._first_state(), 0

    def _read_data(
        self, folder: Path, data: Mapping[str, Source], evaluation: Mapping[str, Source], skip: bool
    ) -> None:
        eos = next(iter(self.config.eos_token_ids), None)
        encoder = Encoder(Tokenizer(folder), eos, self.config.vocab_size, self.width)
        every = {name: _lines(name, source) for name, source in data.items()}
        held_out = {f"{name} (evaluation)": _lines(name, source) for name, source in evaluation.items()}
        datasets = read_datasets({**every, **held_out}, encoder, skip)
        self.datasets = {name: datasets[name] for name in data}
        self.skipped = {name: dataset.skipped for name, dataset in datasets.items() if dataset.skipped}
        self._feed = make_feed(self.datasets, self.batch_size, self.width, self.packing, self.seed)
        self._evaluation = {
            name: Rows(slot, lay_out(datasets[f"{name} (evaluation)"].examples, self.width, packing=True))
            for slot, name in enumerate(data)
            if name in evaluation
        }

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on; a checkpoint is resumed with the same alone."""
        return {
            "model": {
                "config": asdict(self.config),
                "weights": sampled_digest(self.params),
                "dtype": str(self.params.embedding.dtype),
            },
            "implementation": self._implementation,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "micro_batches": self.micro_batches,
            "sequence_length": self.width,
            "packing": self.packing,
            "router_loss": self._router_loss,
            "seed": self.seed,
            "adapters": {
                name: {"data": self.datasets[name].digest, **asdict(recipe)} for name, recipe in self.recipes.items()
            },
        }

    def train_step(self) -> Metrics:
        """One update of every adapter; its metrics stay on the device until they are read."""
        self.state, metrics = self._step(self.state, self.params, self._feed.batch(self.step))
        self.step += 1
        return metrics

    def evaluate(self) -> dict[str, Evaluation]:
        """What the adapters do on their evaluation examples, as they are now."""
        batches = whole_batches(self._evaluation, self._feed.batch_size, self._feed.width, self.packing)
        by_slot = evaluate(lambda batch: self._score(self.state.params, self.params, batch), batches, len(self.recipes))
        return {
            name: evaluation for name, evaluation in zip(self.recipes, by_slot, strict=True) if evaluation is not None
        }

    def adapter(self, name: str) -> LoRAAdapter:
        """An adapter as it is now, for `Model.load_adapter` or `write_adapter`."""
        source = {"base_model_name_or_path": self._source}
        return to_adapter(self.state.params[name], self.recipes[name].spec, self.sites, name, source)

    def write(self, out: str | Path, write_as: str | None = None) -> list[str]:
        """Writes every adapter as a folder of its name, each whole or not at all, over what an earlier run left there.

        Args:
          write_as: a layout of `write_adapter`; the spec's own where None. Others may write copies of shared matrices.

        Returns:
          What is said of each, as `write_adapter` does.
        """
        all_notes = []
        for name in self.recipes:
            names, layout, expand = self._written(name, write_as)
            adapter, folder = self.adapter(name), Path(out) / name
            notes = write_adapter(adapter, folder, self.sites, names, layout, expand=expand, force=True)
            all_notes += [f"{name}: {note}" for note in notes]
        return all_notes

    def _check_written(self, write_as: str | None) -> None:
        """Raises what `write` would of ranks, scales and sharing, which no step of training changes."""
        for name in self.recipes:
            names, layout, expand = self._written(name, write_as)
            plan_adapter(self.adapter(name), self.sites, names, layout, expand=expand)

    def _written(self, name: str, write_as: str | None) -> tuple[AdapterNames, str, bool]:
        """Names and layout of an adapter's folder, and whether it may hold copies of what is shared."""
        check_layout(write_as)
        written_as = WRITTEN_AS[self.specs[name].layout]
        return family(self.config.model_type).ADAPTER_NAMES, write_as or written_as, write_as not in (None, written_as)

    def run(
        self,
        out: str | Path,
        *,
        resume: bool = False,
        save_every: int = 500,
        evaluate_every: int | None = None,
        write_as: str | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> list[str]:
        """Trains to the last step and writes `out/NAME`, beside `out/metrics.jsonl` and `out/checkpoints`.

        Args:
          out: folder of the run.
          resume: continue from the newest checkpoint in `out`, with the bits of a run that was never interrupted; where
            there is none, start from the beginning.
          save_every: steps between checkpoints.
          evaluate_every: steps between evaluations; there is one after the last step in any case.
          write_as: as in `write`.
          report: called as the run progresses.

        Returns:
          As `write`.

        Raises:
          InputError: `out` exists and is not to be resumed, belongs to a run with other settings, or cannot be written;
            or a loss is not finite, with its adapter and step.
          AdapterFormatError: the layout cannot express an adapter; raised before the first step.
        """
        self._check_written(write_as)
        out, save_every = Path(out), whole("save_every", save_every, 1)
        evaluate_every = self.steps if evaluate_every is None else whole("evaluate_every", evaluate_every, 1)
        settings = self.settings()
        with writing_to(out, advice=RESUME), run_folder(out, resume), Checkpoints(out / CHECKPOINTS) as checkpoints:
            if restored := checkpoints.restore(self.state, settings):
                self.step, self.state = restored
            with MetricsFile(out / METRICS, self.step) as metrics:
                log = Log(self._schedules, self.steps, metrics, report)
                while self.step < self.steps:
                    taken = self.train_step()
                    log.add(self.step, taken)
                    last = self.step == self.steps
                    saving, evaluating = last or self.step % save_every == 0, last or self.step % evaluate_every == 0
                    if saving or evaluating or self.step % LOG_EVERY == 0:
                        log.write(self.evaluate() if evaluating and self._evaluation else {})
                    if saving:  # after the metrics of the steps before it, which it promises
                        with writing_to(out, ValueError, advice=RESUME):  # tensorstore's own word for a full disk
                            checkpoints.save(self.step, self.state, settings)
            return self.write(out, write_as)

    def _first_state(self) -> TrainState:
        """Each adapter's weights follow from the seed and its name, whatever the others are."""
        key = jax.random.key(self.seed)
        keys = {name: jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode()))) for name in self.recipes}
        params = {name: init_params(recipe.spec, self.sites, keys[name]) for name, recipe in self.recipes.items()}
        return init_state(params, self._optimizers)


def sampled_digest(params: ModelParams) -> str:
    """SHA-256 of some values of every weight: another model has others, and reading all would take minutes."""
    sha = hashlib.sha256()
    sample = jax.jit(lambda leaf: leaf.reshape(-1)[:: max(1, leaf.size // 256)])
    for leaf in jax.tree.leaves(params):
        sha.update(np.asarray(sample(leaf)).tobytes())
    return sha.hexdigest()


def _check_names(data: Mapping[str, Source], evaluation: Mapping[str, Source]) -> None:
    if not data:
        raise InputError("data names no adapter; give at least one, with its examples.")
    for name in data:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name) or name in RESERVED:
            raise InputError(
                f"Adapter name {name!r} cannot be a folder's; expected letters, digits, '-', '_' and '.', and none of "
                f"{', '.join(RESERVED)}."
            )
    for name in evaluation:
        if name not in data:
            raise InputError(f"evaluation names {name!r}, which is none of the adapters {', '.join(data)}.")


def _check_dtype(dtype: str) -> None:
    if dtype == "float16":
        raise InputError("dtype is 'float16', which has no room for gradients; use bfloat16 or float32.")
    check_dtype(dtype, TRAINING_NAMES)


def _parts(batch_size: int, micro_batches: int, adapters: int) -> int:
    if batch_size < adapters:
        raise InputError(f"batch_size is {batch_size} for {adapters} adapters; give at least one row an adapter.")
    if batch_size % whole("micro_batches", micro_batches, 1):
        raise InputError(f"batch_size is {batch_size}, which {micro_batches} micro_batches do not divide.")
    return micro_batches


def _width(sequence_length: int | None, max_positions: int) -> int:
    if sequence_length is None:
        return min(512, max_positions)
    return whole("sequence_length", sequence_length, 1, max_positions)


def _lines(name: str, source: Source) -> Lines:
    if isinstance(source, str | Path):
        return Path(source)
    return sequence(f"data of {name!r}", source)
