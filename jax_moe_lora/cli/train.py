"""`jax-moe-lora train`: adapters trained together on one frozen model, from JSONL files to adapter folders."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jax_moe_lora.cli.options import Mesh, console, named_values, values_by_name
from jax_moe_lora.errors import InputError

if TYPE_CHECKING:
    from jax_moe_lora.adapters.lora import LoRAAdapter
    from jax_moe_lora.training.log import Progress as Done
    from jax_moe_lora.training.recipe import Recipe
    from jax_moe_lora.training.spec import AdapterSpec
    from jax_moe_lora.training.trainer import Trainer

LINE_SECONDS = 10.0  # between lines where there is no terminal
Each = list[str] | None


def _each(help: str) -> typer.models.OptionInfo:
    return typer.Option(help=f"{help}. VALUE for all, NAME=VALUE for one.", show_default=False)


def train(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a hub id.")],
    adapter: Annotated[list[str], typer.Option(help="NAME=FILE.jsonl of an adapter to train; repeat for more.")],
    out: Annotated[Path, typer.Option(help="Folder to make: OUT/NAME for each adapter, metrics and checkpoints.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of every adapter.")] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="In place of --steps: how often the adapter with the most rows sees each of them."),
    ] = None,
    from_adapter: Annotated[
        Each, typer.Option(help="NAME=DIR of an adapter whose weights, rank, alpha, layout and targets it starts with.")
    ] = None,
    rank: Annotated[Each, _each("Rank; default 16")] = None,
    alpha: Annotated[Each, _each("The update is scaled by alpha / rank; default 2 x rank")] = None,
    layout: Annotated[Each, _each("fused, per-expert or shared-outer; default fused")] = None,
    targets: Annotated[Each, _each("Projections, as in gate,up,down,q,v; default gate,up,down")] = None,
    lr: Annotated[Each, _each("Learning rate; default 2e-4")] = None,
    schedule: Annotated[Each, _each("constant, cosine or linear, after the warmup; default cosine")] = None,
    warmup: Annotated[Each, _each("Steps in which the rate rises; default 0")] = None,
    weight_decay: Annotated[Each, _each("Of AdamW; default 0")] = None,
    clip: Annotated[Each, _each("Largest norm of the adapter's gradient, or none; default 1")] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    init: Annotated[str, typer.Option(help="Of A: kaiming or gaussian. B begins at zero.")] = "kaiming",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an update; the adapters take turns.")] = 8,
    micro_batches: Annotated[int, typer.Option(min=1, help="Parts in which they are computed one by one.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; 512 if not given, or what the model takes.")
    ] = None,
    packing: Annotated[bool, typer.Option("--packing/--padding", help="Several examples a row, or one.")] = True,
    router_loss: Annotated[float, typer.Option(min=0.0, help="Coefficient of the load-balancing loss.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the frozen model: float32 or bfloat16.")] = "bfloat16",
    eval: Annotated[
        Each, typer.Option(help="NAME=FILE.jsonl to evaluate an adapter on: loss, and exact answers.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps; only after the last if not given.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints; the last two are kept.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT's run from its last checkpoint.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the first weights and the order of examples.")] = 0,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that cannot be trained on, and count them.")
    ] = False,
    extra_columns: Annotated[
        str, typer.Option(help="refuse lines with fields that their form does not have, or ignore such fields.")
    ] = "refuse",
    log_to: Annotated[Each, typer.Option(help="tensorboard or wandb, beside metrics.jsonl; repeat for both.")] = None,
    write_as: Annotated[
        str | None, typer.Option(help="Layout of the folders, as in convert; the closest to --layout if not given.")
    ] = None,
    mesh: Mesh = None,
) -> None:
    """Train adapters together. Bad lines are named before anything runs.

    A line is {"prompt", "completion"}, {"text"}, {"messages"}, {"conversations"} (ShareGPT) or {"instruction",
    "output"} (Alpaca).
    """
    from jax_moe_lora.training.checks import check_extra_columns
    from jax_moe_lora.training.run_folder import check_out
    from jax_moe_lora.training.spec import check_layout
    from jax_moe_lora.training.trackers import check_trackers
    from jax_moe_lora.training.trainer import Trainer

    check_out(out, resume)
    check_layout(write_as)
    trackers = check_trackers(log_to or ())
    data = _files("--adapter", adapter)
    starts, start_specs = _starts(model, from_adapter or [], data)
    given = {
        "rank": rank,
        "alpha": alpha,
        "layout": layout,
        "targets": targets,
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "weight-decay": weight_decay,
        "clip": clip,
    }
    trainer = Trainer(
        model,
        data,
        steps=steps,
        epochs=epochs,
        recipe=_recipes(tuple(data), given, rslora, init, start_specs),
        from_adapter=starts,
        evaluation={**_checked("--eval", _files("--eval", eval or []), data)},
        batch_size=batch_size,
        micro_batches=micro_batches,
        sequence_length=sequence_length,
        packing=packing,
        router_loss=router_loss,
        seed=seed,
        dtype=dtype,
        skip_bad_lines=skip_bad_lines,
        extra_columns=check_extra_columns(extra_columns),
        mesh=mesh,
    )
    _say_what_was_left_out(trainer)
    with ProgressBars(tuple(data), trainer.steps) as bars:
        notes = trainer.run(
            out,
            resume=resume,
            save_every=save_every,
            evaluate_every=eval_every,
            write_as=write_as,
            log_to=trackers,
            report=bars,
        )
    sys.stdout.write("".join(f"{line}\n" for line in (*notes, *(f"{out / name}: written" for name in data))))


def _recipes(
    names: Sequence[str], given: Mapping[str, Each], rslora: bool, init: Any, start_specs: Mapping[str, "AdapterSpec"]
) -> dict[str, "Recipe"]:
    """The recipe of each adapter; where an option is not given, that of its start or the library's default."""
    from jax_moe_lora.training.recipe import Recipe
    from jax_moe_lora.training.spec import AdapterSpec

    def values_of(option: str, convert: Callable[[str], Any], default: Any) -> dict[str, Any]:
        return values_by_name(f"--{option}", given[option], names, convert, default)

    spec_options = {
        "rank": values_of("rank", int, None),
        "alpha": values_of("alpha", float, None),
        "layout": values_of("layout", str, None),
        "targets": values_of("targets", _modules, None),
    }
    rates, schedules = values_of("lr", float, Recipe.learning_rate), values_of("schedule", str, Recipe.schedule)
    warmups, decays = values_of("warmup", int, Recipe.warmup), values_of("weight-decay", float, Recipe.weight_decay)
    clips = values_of("clip", _number_or_none, Recipe.clip)
    recipes = {}
    for name in names:
        asked = {option: values[name] for option, values in spec_options.items() if values[name] is not None}
        base = start_specs.get(name, AdapterSpec())
        spec = replace(base, **asked, rank_stabilised=rslora or base.rank_stabilised, init=init)
        recipes[name] = Recipe(spec, rates[name], schedules[name], warmups[name], decays[name], clips[name])
    return recipes


def _starts(
    model: str, entries: Sequence[str], data: Mapping[str, Path]
) -> tuple[dict[str, "LoRAAdapter"], dict[str, "AdapterSpec"]]:
    """The adapters that others start from, and their specs."""
    folders = _checked("--from-adapter", named_values("--from-adapter", entries, "DIR"), data)
    if not folders:
        return {}, {}
    from jax_moe_lora.files.hub import local_folder
    from jax_moe_lora.models.config_file import read_model_config
    from jax_moe_lora.models.sites import adapter_sites
    from jax_moe_lora.training.adapters import spec_of
    from jax_moe_lora.training.start import read_starts

    config = read_model_config(local_folder(model))
    adapters = read_starts(folders, config)
    return adapters, {name: spec_of(adapter, adapter_sites(config)) for name, adapter in adapters.items()}


def _checked[Values: Mapping[str, Any]](option: str, values: Values, data: Mapping[str, Path]) -> Values:
    """Refuses names that no --adapter has."""
    for name in sorted(set(values) - set(data)):
        raise InputError(f"{option} names {name!r}, which no --adapter does.")
    return values


def _say_what_was_left_out(trainer: "Trainer") -> None:
    for name, count in trainer.data.skipped.items():
        sys.stdout.write(f"{name}: {count} bad lines left out\n")
    for name, columns in trainer.data.ignored_columns.items():
        sys.stdout.write(f"{name}: columns ignored: {', '.join(columns)}\n")
    for name, epochs in trainer.epochs.items():
        sys.stderr.write(f"{name}: {trainer.steps} steps, {epochs:.3g} epochs\n")


def _modules(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _files(option: str, entries: Sequence[str]) -> dict[str, Path]:
    return {name: Path(file) for name, file in named_values(option, entries, "FILE.jsonl").items()}


class ProgressBars:
    """Progress on standard error: a bar an adapter on a terminal, else a line now and then; a context manager."""

    def __init__(self, names: Sequence[str], steps: int):
        self._console = console(stderr=True)
        columns = ("{task.description}", "loss {task.fields[loss]}", "{task.fields[rate]} tokens/s")
        self._bars = Progress(
            TextColumn(columns[0]),
            BarColumn(),
            MofNCompleteColumn(),
            *map(TextColumn, columns[1:]),
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {
            name: self._bars.add_task(name, total=steps, loss="", rate="") for name in names
        }
        self._next_line = 0.0

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, done: "Done") -> None:
        for name, task in self._tasks.items():
            rate, loss = f"{done.rates[name]:,.0f}", f"{done.losses[name]:.4f}"
            self._bars.update(task, completed=done.step, loss=loss, rate=rate)
        self._say(done)

    def _say(self, done: "Done") -> None:
        now = self._bars.get_time()
        if self._bars.disable and (now >= self._next_line or done.step == done.steps):
            self._next_line = now + LINE_SECONDS
            each = (f"{name} loss {done.losses[name]:.4f} {done.rates[name]:,.0f} tokens/s" for name in done.losses)
            self._print(f"step {done.step}/{done.steps}: {'; '.join(each)}")
        for name, evaluation in done.evaluations.items():
            right = f"{evaluation.exact_match:.1%} of {evaluation.examples} exact"
            self._print(f"step {done.step}/{done.steps}: {name} evaluation loss {evaluation.loss:.4f}, {right}")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
