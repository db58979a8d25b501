"""`jax-moe-lora generate`: requests from JSONL or options, answered in mixed batches."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jax_moe_lora.cli.options import (
    Distributed,
    Dtype,
    Mesh,
    Quantise,
    StartSeconds,
    join_processes,
    named_values,
    values_by_name,
    write_file,
)
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.folders import check_writable
from jax_moe_lora.files.messages import CHAT_FIELDS
from jax_moe_lora.files.safetensors_io import parse_json
from jax_moe_lora.files.text import decode, jsonl_lines
from jax_moe_lora.serving.sampling_params import NAMES, SamplingParams, fold_seed

if TYPE_CHECKING:
    from jax_moe_lora.serving.answers import Generation
    from jax_moe_lora.serving.model import Model


def generate(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a hub id.")],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=DIR of an adapter to load; repeat for more.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help='JSONL of {"prompt" or "messages", "adapter", ...} lines.')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL of answers; standard output if not given.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat for more.")] = None,
    use: Annotated[
        str | None, typer.Option(help="Adapter of the --prompt requests; the base model if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
    min_new_tokens: Annotated[int, typer.Option(help="The fewest tokens of an answer.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="Each request derives its own from it; fresh ones if not given.")
    ] = None,
    n: Annotated[int, typer.Option(help="Answers per request.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends an answer; repeat for more.")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="A token that ends an answer; repeat for more.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-sequence tokens.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Report log-probabilities, also of this many top tokens.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 8,
    dtype: Dtype = "bfloat16",
    max_rank: Annotated[int, typer.Option(min=1)] = 64,
    adapter_memory: Annotated[str, typer.Option(help="Memory for adapters on each device.")] = "4GiB",
    mesh: Mesh = None,
    quantise: Quantise = None,
    distributed: Distributed = False,
    start_seconds: StartSeconds = 20,
    lora_b_layout: Annotated[
        list[str] | None,
        typer.Option(
            help="[NAME=]ORDER of B's columns in 3-D experts, where the file does not say it: rank_major (PEFT) or "
            "grouped_by_expert (Unsloth before 2026-09-17)."
        ),
    ] = None,
) -> None:
    """Answer prompts, each with its own adapter, in mixed batches."""
    prints = join_processes(distributed, mesh, start_seconds)
    if prints:
        check_writable(out)
    defaults = SamplingParams(
        max_new_tokens,
        min_new_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        seed,
        n,
        stop or (),
        stop_token_id or (),
        ignore_eos,
        logprobs,
    )
    jobs = read_jobs(requests, prompt or [], use, defaults)
    served = load_model(
        model, adapter or [], jobs, dtype, max_rank, adapter_memory, lora_b_layout or [], mesh, quantise
    )
    watched = prints and out is not None and sys.stderr.isatty()
    answers = list(run_jobs(served, jobs, batch_size, progress=watched))
    if not prints:
        return
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text)
        cut = sum(answer["finish_reason"] == "length" for answer in answers)
        sys.stdout.write(f"{out}: {len(answers)} answers to {len(jobs)} requests, {cut} of them cut at their limit\n")


@dataclass(frozen=True)
class Job:
    """One line: how to answer what with which adapter.

    Attributes:
      where: what errors call it.
      prompt: a text, or an object of `messages` and perhaps `tools` and `chat_template_kwargs`.
      adapter: None is the base model.
      params: how to answer.
    """

    where: str
    prompt: str | dict[str, Any]
    adapter: str | None
    params: SamplingParams


def read_jobs(file: Path | None, prompts: Sequence[str], use: str | None, defaults: SamplingParams) -> list[Job]:
    """The jobs of a JSONL file, or of prompts that all use one adapter.

    Args:
      file: lines of prompt, adapter and fields of `SamplingParams`; or
      prompts: texts.
      use: the adapter of the prompts.
      defaults: what a request uses where its line does not say. Of its seed each gets its own.

    Raises:
      InputError: neither or both forms, a file that cannot be read, or a bad line, by its number.
    """
    if (file is None) == (not prompts):
        raise InputError("Give either --requests FILE.jsonl or at least one --prompt.")
    if file is None:
        return [Job(f"--prompt {n}", prompt, use, _own_seed(defaults, n - 1)) for n, prompt in enumerate(prompts, 1)]
    if use is not None:
        raise InputError("--use goes with --prompt; in --requests each line names its own adapter.")
    jobs = [
        _job(f"{file}, line {number}", line, _own_seed(defaults, index))
        for index, (number, line) in enumerate(jsonl_lines(file))
    ]
    if not jobs:
        raise InputError(f"{file} holds no requests.")
    return jobs


def _own_seed(defaults: SamplingParams, index: int) -> SamplingParams:
    return defaults if defaults.seed is None else replace(defaults, seed=fold_seed(defaults.seed, "prompt", index))


def _job(where: str, line: bytes, defaults: SamplingParams) -> Job:
    raw = parse_json(decode(line, where), where, InputError)
    if "prompt" in raw and "messages" in raw:
        raise InputError(f'{where} has both "prompt" and "messages"; give one of them.')
    chat = {name: raw[name] for name in CHAT_FIELDS if name in raw} if "messages" in raw else {}
    if not chat and not isinstance(raw.get("prompt"), str):
        raise InputError(
            f'{where} has no "prompt" text and no "messages"; expected an object such as '
            '{"prompt": "...", "adapter": "sql"}.'
        )
    adapter = raw.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise InputError(f"{where} has adapter {adapter!r}; expected a name or null.")
    options = {name: value for name, value in raw.items() if name not in ("prompt", "adapter", *chat)}
    if unknown := set(options) - set(NAMES):
        known = ", ".join(("prompt", *CHAT_FIELDS, "adapter", *NAMES))
        raise InputError(f"{where} has {', '.join(sorted(unknown))}; known are {known}.")
    try:
        return Job(where, chat or raw["prompt"], adapter, replace(defaults, **options))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def load_model(
    model: str,
    adapters: Sequence[str],
    jobs: Sequence[Job],
    dtype: str,
    max_rank: int,
    adapter_memory: str,
    lora_b_layouts: Sequence[str] = (),
    mesh: str | None = None,
    quantise: str | None = None,
) -> "Model":
    """The model with its adapters, each given as NAME=DIR; names that jobs use are checked before loading."""
    from jax_moe_lora.adapters.formats.detect import adapts_vocabulary, whole_matrices
    from jax_moe_lora.files.hub import local_folder
    from jax_moe_lora.serving.model import Model

    folders = named_values("--adapter", adapters, "DIR")
    missing = {job.adapter for job in jobs} - set(folders) - {None, "__base__"}
    if missing:
        named, given = ", ".join(sorted(map(str, missing))), ", ".join(sorted(folders)) or "none"
        raise InputError(f"Requests use adapters that are not given: {named} (given: {given}); add --adapter NAME=DIR.")
    layouts: dict[str, str | None] = values_by_name("--lora-b-layout", lora_b_layouts, list(folders), str, None)
    served = Model.from_pretrained(
        model,
        dtype=dtype,
        max_adapters=max(1, len(folders)),
        max_rank=max_rank,
        adapter_memory=adapter_memory,
        mesh=mesh,
        quantise=quantise,
        adapter_targets="all" if any(adapts_vocabulary(local_folder(folder)) for folder in folders.values()) else None,
        max_replacements=sum(whole_matrices(local_folder(folder)) for folder in folders.values()),
    )
    for name, folder in folders.items():
        served.load_adapter(folder, adapter_name=name, lora_b_layout=layouts[name])
    return served


def run_jobs(model: "Model", jobs: Sequence[Job], batch_size: int, progress: bool = False) -> Iterator[dict[str, Any]]:
    """The answers in the order of the jobs; requests of nearby lengths run together, whatever their adapters are.

    Raises:
      InputError: a request that the model cannot answer, by its line; nothing has run then.
    """
    from jax_moe_lora.serving.requests import Request

    requests = [
        Request.make(job.where, job.prompt, model.tokenizer.encode_prompt, model.config, job.params) for job in jobs
    ]
    order = sorted(range(len(jobs)), key=lambda index: len(requests[index].token_ids))
    answers: dict[int, list[dict[str, Any]]] = {}
    for begin in range(0, len(order), batch_size):
        some = order[begin : begin + batch_size]
        batch, prompts = [jobs[index] for index in some], [requests[index].token_ids for index in some]
        records = [job.params for job in batch]
        outs = model.generate(prompts, [job.adapter for job in batch], sampling_params=records, progress=progress)
        for index, job, out in zip(some, batch, outs, strict=True):
            answers[index] = [_answer(job, sample, one) for sample, one in enumerate(out.samples)]
    return (answer for index in range(len(jobs)) for answer in answers[index])


def _answer(job: Job, sample: int, out: "Generation") -> dict[str, Any]:
    """One line of answers; what was not asked for is left out."""
    answer: dict[str, Any] = {
        **(job.prompt if isinstance(job.prompt, dict) else {"prompt": job.prompt}),
        "adapter": job.adapter,
        "text": out.text,
        "finish_reason": out.finish_reason,
        "tokens": len(out.token_ids),
    }
    if job.params.temperature:
        answer["seed"] = out.seed
    if job.params.n > 1:
        answer["sample"] = sample
    if out.stop_reason is not None:
        answer["stop_reason"] = out.stop_reason
    if out.logprobs is not None:
        answer["logprobs"] = [asdict(one) for one in out.logprobs]
    return answer
