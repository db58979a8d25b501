"""Training of many adapters at once on one frozen model, from JSONL files to adapter folders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.adapters.writing import plan_adapter, write_adapter
from jax_moe_lora.arguments import flag, whole
from jax_moe_lora.devices import require_device
from jax_moe_lora.files.folders import writing_to
from jax_moe_lora.files.hub import local_folder
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.mesh.rules import make_mesh
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.training import checks
from jax_moe_lora.training.adapters import Params, to_adapter
from jax_moe_lora.training.adapters import from_adapter as params_from
from jax_moe_lora.training.checkpoint import Checkpoints, model_settings, sampled_digest
from jax_moe_lora.training.examples import Encoder
from jax_moe_lora.training.forms import ExtraColumns
from jax_moe_lora.training.layout import step_layout
from jax_moe_lora.training.log import Log, Progress
from jax_moe_lora.training.recipe import Recipe, recipes_of
from jax_moe_lora.training.rows import whole_batches
from jax_moe_lora.training.run_folder import CHECKPOINTS, METRICS, MetricsFile, run_folder
from jax_moe_lora.training.scoring import Evaluation, evaluate, make_scoring
from jax_moe_lora.training.sources import Source, read_training_data
from jax_moe_lora.training.spec import AdapterSpec, written_as
from jax_moe_lora.training.start import Start, check_same, first_params, read_starts
from jax_moe_lora.training.step import Metrics, init_state, make_step
from jax_moe_lora.training.trackers import Tracker, check_trackers, open_trackers
from pallas_kernels.ops import Implementation

LOG_EVERY = 10  # steps
RESUME = "once it can, go on with --resume"
EMPTY: Mapping[str, Any] = {}


class Trainer:
    """Trains adapters together: each batch has rows of all of them, and each adapter sees only its own examples.

    The constructor checks its arguments, then reads the data, then the model.

    Args:
      model: checkpoint folder, or a hub id.
      data: adapter -> a JSONL file, or the objects of its lines, in any form of `training.forms`.
      steps: updates of every adapter; give this or `epochs`.
      epochs: how often the adapter with the most rows sees each of them; give this or `steps`.
      recipe: one for all adapters, or one for each.
      from_adapter: adapter -> a folder, hub id or `LoRAAdapter` whose weights it starts from; others start new.
      evaluation: held-out data like `data`, for some of the adapters.
      batch_size: rows per update, at least one per adapter; the adapters take turns.
      micro_batches: parts of a batch that are computed one after the other.
      sequence_length: tokens per row; None is 512, or the model's positions where they are fewer.
      packing: put several examples into a row.
      router_loss: coefficient of the load-balancing loss.
      seed: of the initial weights and the order of the examples.
      dtype: of the frozen model, float32 or bfloat16; adapters and their optimizers are float32.
      skip_bad_lines: leave out lines that cannot be trained on; `data.skipped` counts them.
      extra_columns: `refuse` lines with fields that their form does not have, or `ignore` these fields, whose names
        `data.ignored_columns` has.
      implementation: a backend by name, or None for the best that is available.
      mesh: the devices that model, adapters, optimizers and rows are split over, as `Model.from_pretrained` takes them.

    Raises:
      InputError: a bad argument, or a mesh that does not divide the model or the batch.
      TrainingDataError: lines that cannot be trained on, all of them at once.
      AdapterFormatError: an adapter to start from is not understood, or does not fit the model.
      ConfigError: the model's config is not supported.
      CheckpointError: the model's files are missing or corrupt, or its chat template is missing.
      DeviceError: jax has no device.
    """

    def __init__(
        self,
        model: str | Path,
        data: Mapping[str, Source],
        *,
        steps: int | None = None,
        epochs: float | None = None,
        recipe: Recipe | Mapping[str, Recipe] | None = None,
        from_adapter: Mapping[str, Start] = EMPTY,
        evaluation: Mapping[str, Source] = EMPTY,
        batch_size: int = 8,
        micro_batches: int = 1,
        sequence_length: int | None = None,
        packing: bool = True,
        router_loss: float = 0.0,
        seed: int = 0,
        dtype: str = "bfloat16",
        skip_bad_lines: bool = False,
        extra_columns: ExtraColumns = "refuse",
        implementation: Implementation | None = None,
        mesh: str | Mesh | None = None,
    ):
        checks.check_names(data, evaluation=evaluation, from_adapter=from_adapter)
        steps, epochs = checks.check_length(steps, epochs)
        self.seed, self.packing = whole("seed", seed, 0), flag("packing", packing)
        checks.check_training_dtype(dtype)
        require_device()
        self.batch_size, self.mesh = whole("batch_size", batch_size, 1), make_mesh(mesh)
        self.micro_batches = checks.check_micro_batches(self.batch_size, micro_batches, len(data), self.mesh)
        folder = local_folder(model)
        self.config, self._source = read_model_config(folder), str(model)
        self.sites, self.width = layer_sites(self.config), checks.row_width(sequence_length, self.config.max_positions)
        self.recipes = recipes_of(recipe, data)
        starts = self._resolve_specs(from_adapter)
        extra_columns = checks.check_extra_columns(extra_columns)
        self.data = read_training_data(
            data,
            evaluation,
            Encoder(Tokenizer(folder), self.config.eos_token_ids, self.config.vocab_size, self.width, extra_columns),
            batch_size=self.batch_size,
            packing=self.packing,
            seed=self.seed,
            skip_bad_lines=flag("skip_bad_lines", skip_bad_lines),
        )
        self.steps = steps or checks.steps_of(epochs or 0.0, self.data.most_rows, len(data), self.batch_size)
        self._layout.check_blocks(folder)
        self._make_programs(router_loss, implementation)
        self.params = load_params(folder, self.config, dtype, self._layout.model_placement)
        params = first_params(self.specs, self.sites, self.seed, starts, self._layout.placements)
        self.state, self.step = init_state(params, self._optimizers, self._layout.placements), 0

    def _resolve_specs(self, from_adapter: Mapping[str, Start]) -> dict[str, Params]:
        """Gives every recipe its spec, and checks them; the params of the adapters that start from others."""
        starts = {
            name: params_from(adapter, self.sites) for name, adapter in read_starts(from_adapter, self.config).items()
        }
        self.specs: dict[str, AdapterSpec] = {}
        for name, recipe in self.recipes.items():
            start = starts[name][1] if name in starts else None
            if recipe.spec is not None and start is not None:
                check_same(name, recipe.spec, start, self.sites)
            self.specs[name] = start or recipe.spec or AdapterSpec()
            self.recipes[name] = replace(recipe, spec=self.specs[name])
            self.recipes[name].check(name, self.sites)
        self._layout = step_layout(self.config, self.specs, self.mesh)
        self._start_digests = {name: sampled_digest(params) for name, (params, _) in starts.items()}
        return {name: params for name, (params, _) in starts.items()}

    def _make_programs(self, router_loss: float, implementation: Implementation | None) -> None:
        for name, recipe in self.recipes.items():
            recipe.check_schedule(name, self.steps)
        self._schedules = {name: recipe.schedule_of(self.steps) for name, recipe in self.recipes.items()}
        self._optimizers = {name: recipe.optimizer(self.steps) for name, recipe in self.recipes.items()}
        self._step = make_step(
            self.config,
            self.specs,
            self._optimizers,
            clip={name: recipe.clip for name, recipe in self.recipes.items()},
            router_loss=router_loss,
            micro_batches=self.micro_batches,
            implementation=implementation,
            mesh=self.mesh,
        )
        self._router_loss, self._implementation = router_loss, implementation
        self._score = make_scoring(self.config, self.specs, implementation, self.mesh)

    @property
    def epochs(self) -> dict[str, float]:
        """Adapter -> how often it sees each of its rows in the whole run."""
        turns = self.steps * self.batch_size / len(self.recipes)
        return {name: turns / len(adapter.rows) for name, adapter in self.data.feed.adapters.items()}

    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on; a run is resumed only with the same settings."""
        return {
            "model": model_settings(self.config, self.params),
            "implementation": self._implementation,
            **({} if self.mesh is None else {"mesh": dict(self.mesh.shape)}),
            "steps": self.steps,
            "batch_size": self.batch_size,
            "micro_batches": self.micro_batches,
            "sequence_length": self.width,
            "packing": self.packing,
            "router_loss": self._router_loss,
            "seed": self.seed,
            "adapters": {
                name: {"data": self.data.digests[name], "start": self._start_digests.get(name), **asdict(recipe)}
                for name, recipe in self.recipes.items()
            },
        }

    def train_step(self) -> Metrics:
        """Updates every adapter once; the metrics stay on the device until they are read."""
        self.state, metrics = self._step(self.state, self.params, self.data.feed.batch(self.step))
        self.step += 1
        return metrics

    def evaluate(self) -> dict[str, Evaluation]:
        """The adapters' results on their evaluation examples, with their present weights."""
        batches = whole_batches(self.data.evaluation, self.data.feed.batch_size, self.data.feed.width, self.packing)
        by_slot = evaluate(lambda batch: self._score(self.state.params, self.params, batch), batches, len(self.recipes))
        return {name: result for name, result in zip(self.recipes, by_slot, strict=True) if result is not None}

    def adapter(self, name: str) -> LoRAAdapter:
        """An adapter with its present weights, for `Model.load_adapter` or `write_adapter`."""
        source = {"base_model_name_or_path": self._source}
        return to_adapter(self.state.params[name], self.specs[name], self.sites, name, source)

    def write(self, out: str | Path, write_as: str | None = None) -> list[str]:
        """Writes every adapter to `out/NAME`, each completely or not at all; existing folders are replaced.

        Args:
          out: where the folders are made.
          write_as: a format of `write_adapter`; None is the one of the spec's layout. Others may write copies of shared
            matrices.

        Returns:
          The notes of `write_adapter` for each adapter.
        """
        all_notes = []
        for name, spec in self.specs.items():
            end_tokens = self.data.end_tokens[name].union(self.config.eos_token_ids)
            # Answers that end with another token than the model's would go on without end.
            ends = {"eos_token_id": sorted(end_tokens)} if end_tokens > {*self.config.eos_token_ids} else None
            form = written_as(spec.layout, write_as)
            adapter, folder = self.adapter(name), Path(out) / name
            names = adapter_names(self.config)
            notes = write_adapter(adapter, folder, self.sites, names, **form, force=True, generation_config=ends)
            all_notes += [f"{name}: {note}" for note in notes]
        return all_notes

    def _check_written(self, write_as: str | None) -> None:
        """Raises what `write` would raise for ranks, scales and sharing, which training does not change."""
        for name, spec in self.specs.items():
            form = written_as(spec.layout, write_as)
            plan_adapter(self.adapter(name), self.sites, adapter_names(self.config), **form)

    def run(
        self,
        out: str | Path,
        *,
        resume: bool = False,
        save_every: int = 500,
        evaluate_every: int | None = None,
        write_as: str | None = None,
        log_to: Sequence[Tracker] = (),
        report: Callable[[Progress], None] | None = None,
    ) -> list[str]:
        """Trains to the last step and writes `out/NAME`, beside `out/metrics.jsonl` and `out/checkpoints`.

        Args:
          out: folder of the run.
          resume: continue from the newest checkpoint in `out`, with the bits of a run that was never interrupted; start
            from the beginning where there is no checkpoint.
          save_every: steps between checkpoints.
          evaluate_every: steps between evaluations; the last step is always followed by one.
          write_as: as in `write`.
          log_to: `tensorboard`, `wandb` or both: trackers that get the figures of `metrics.jsonl`.
          report: called as the run progresses.

        Returns:
          The notes of `write`.

        Raises:
          InputError: `out` exists and is not to be resumed, belongs to a run with other settings, or cannot be written;
            or a loss is not finite, with its adapter and step.
          AdapterFormatError: the layout cannot express an adapter; raised before the first step.
        """
        self._check_written(write_as)
        trackers, resume = check_trackers(log_to), flag("resume", resume)
        out, save_every = Path(out), whole("save_every", save_every, 1)
        evaluate_every = self.steps if evaluate_every is None else whole("evaluate_every", evaluate_every, 1)
        settings = self.settings()
        with writing_to(out, advice=RESUME), run_folder(out, resume), Checkpoints(out / CHECKPOINTS) as checkpoints:
            if restored := checkpoints.restore(self.state, settings):
                self.step, self.state = restored
            with (
                MetricsFile(out / METRICS, self.step) as metrics,
                open_trackers(trackers, out, metrics.kept, settings) as sinks,
            ):
                log = Log(self._schedules, self.steps, [metrics, *sinks], report)
                while self.step < self.steps:
                    self._advance(log, checkpoints, settings, save_every, evaluate_every)
            return self.write(out, write_as)

    def _advance(
        self, log: Log, checkpoints: Checkpoints, settings: Mapping[str, Any], save_every: int, evaluate_every: int
    ) -> None:
        """Takes one step; then logs, evaluates and saves where it is time."""
        log.add(self.step + 1, self.train_step())
        last = self.step == self.steps
        saving, evaluating = last or self.step % save_every == 0, last or self.step % evaluate_every == 0
        if saving or evaluating or self.step % LOG_EVERY == 0:
            log.write(self.evaluate() if evaluating and self.data.evaluation else {})
        if saving:  # after the metrics: they must reach the checkpoint's step
            with writing_to(
                checkpoints.folder.parent, ValueError, advice=RESUME
            ):  # tensorstore's own word for a full disk
                checkpoints.save(self.step, self.state, settings)
