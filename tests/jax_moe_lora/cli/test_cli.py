"""The command line: answers, reports, and one sentence with exit code 2 on bad input."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jax_moe_lora import AdapterFormatError, InputError
from jax_moe_lora.cli.generate import load_model, read_jobs, run_jobs
from jax_moe_lora.cli.main import main
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.files.sizes import parse_bytes
from jax_moe_lora.inspect import AdapterSummary, inspect_folder
from jax_moe_lora.serving.sampling_params import SamplingParams, fold_seed

pytestmark = pytest.mark.xdist_group("cli")
MODEL = str(data_folder() / "model")
UPPER, SORT = (f"{name}={data_folder() / 'adapters' / name}" for name in ("upper", "sort"))


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jax_moe_lora.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The one line that a refused command writes to standard error; any other exception fails the test."""

    def refuse(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["jax-moe-lora", *arguments])
        with pytest.raises(SystemExit) as exit:
            main()
        written = capsys.readouterr()
        assert (exit.value.code, written.out) == (2, "")
        assert len(written.err.splitlines()) == 1
        return written.err

    return refuse


@pytest.mark.slow
def test_generate_answers_a_file_of_mixed_requests(tmp_path):
    lines = [
        {"prompt": "abc>", "adapter": "upper"},
        {"prompt": "cab>", "adapter": "sort", "max_new_tokens": 2},
        {"prompt": "dog>"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "out.jsonl"
    arguments = ["--adapter", UPPER, "--adapter", SORT, "--requests", str(tmp_path / "in.jsonl"), "--out", str(out)]
    done = run("generate", "--model", MODEL, *arguments, "--dtype", "float32", "--max-new-tokens", "10")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(a["adapter"], a["text"], a["finish_reason"]) for a in answers] == [
        ("upper", "ABC", "stop"),
        ("sort", "ab", "length"),
        (None, "dog", "stop"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert done.stdout == f"{out}: 3 answers to 3 requests, 1 of them cut at their limit\n"


@pytest.mark.slow
def test_generate_answers_prompts_on_standard_output():
    arguments = ["--adapter", UPPER, "--prompt", "abc>", "--use", "upper", "--max-new-tokens", "8"]
    done = run("generate", "--model", MODEL, *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "ABC"


def test_inspect_tells_a_model_and_an_adapter_apart():
    model = json.loads(run("inspect", MODEL, "--json").stdout)
    layers = model["config"]["layers"]
    assert (model["kind"], model["model_type"], model["layers"]) == ("model", "qwen3_moe", len(layers))
    assert {layer["mlp"]["moe"]["num_experts"] for layer in layers} == {model["experts"]}
    assert model["parameters"] > 0
    assert model["shards"] >= 1
    adapter = json.loads(run("inspect", str(data_folder() / "adapters" / "upper"), "--json").stdout)
    assert adapter["kind"] == "adapter"
    assert {m["module"] for m in adapter["modules"]} >= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    shown = run("inspect", str(data_folder() / "adapters" / "sort")).stdout
    assert "2-D per expert" in shown


def test_inspect_shows_the_rank_of_each_3d_parameter_and_the_patterns():
    """The shipped `shift`: gate_up_proj has rank 12 by a pattern, and A of 8 experts; down_proj rank 6."""
    folder = data_folder() / "adapters" / "shift"
    summary = inspect_folder(folder)
    assert isinstance(summary, AdapterSummary)
    shown = {module.module: (module.ranks, module.shape_a[0]) for module in summary.modules}
    assert shown == {"mlp.experts.gate_up_proj": ([12], 96), "mlp.experts.down_proj": ([6], 48)}
    printed = run("inspect", str(folder)).stdout
    assert r"rank_pattern: .*\.gate_up_proj has 12" in printed
    assert r"alpha_pattern: .*\.gate_up_proj has 24" in printed


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_alpha": "big"}, "lora_alpha is 'big'; expected a number of at most 1e"),
        ({"lora_alpha": 10**400}, "a number of at most 1e"),
        ({"target_parameters": [1, 2]}, "target_parameters is [1, 2]; expected a list of names"),
        ({"r": 7, "rank_pattern": {}}, "rank 7, which does not divide its 96 rows"),
    ],
)
def test_inspect_refuses_a_malformed_config_by_its_field(tmp_path, changes, sentence):
    shutil.copytree(data_folder() / "adapters" / "shift", tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(AdapterFormatError) as refused:
        inspect_folder(tmp_path / "bad")
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "size", ["9" * 400, "9" * 400 + "GiB", pytest.param(-(10**5000), id="5000 digits"), "1e3", None, -1]
)
def test_a_size_that_is_no_size_is_refused_in_a_short_sentence(size):
    with pytest.raises(InputError, match="is not understood") as refused:
        parse_bytes(size)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "no/such/folder"], "There is no folder no/such/folder"),
        (["inspect", f"{MODEL}/config.json"], "config.json is a file; give the model or adapter folder"),
        (["generate", "--model", "no/such/folder/at/all", "--prompt", "a>"], "There is no folder"),
        (["generate", "--model", MODEL], "Give either --requests"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--use", "x"], "not given: x (given: none); add"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--adapter", "x"], "is not NAME=DIR; put a name"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--adapter", "x=/no/such"], "There is no folder /no/such"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--dtype", "int8"], "dtype is 'int8'"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--adapter-memory", "lots"], "Size 'lots'"),
        (["generate", "--model", MODEL, "--requests", "/no/such.jsonl"], "File not found: /no/such.jsonl"),
        (["generate", "--model", UPPER.partition("=")[2], "--prompt", "a>"], "holds an adapter, not a model"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--adapter", f"x={MODEL}"], "holds a model, not an adapter"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--out", "/no/such/out"], "there is no folder /no/such"),
        (["generate", "--model", MODEL, "--prompt", "a>", "--out", MODEL], "it is a folder"),
        (["demo", "--json", "/no/such/report.json"], "there is no folder /no/such"),
        (
            ["generate", "--model", MODEL, "--prompt", "a>", "--max-rank", "0"],
            "Invalid value for '--max-rank'",
        ),
        (["generate", "--model", MODEL, "--prompt", "a>", "--top-k", "few"], "Invalid value for '--top-k'"),
        (["generate", "--prompt", "a>"], "Missing option '--model'"),
        (["demo", "--strongs", "3"], "No such option: --strongs"),
        (["serve"], "No such command 'serve'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(refusal, arguments, sentence):
    assert sentence in refusal(*arguments)


@pytest.mark.parametrize("command", ["bench", "bench-model", "bench-load"])
def test_results_that_have_no_place_are_refused_before_the_work(command, refusal, tmp_path):
    (tmp_path / "file").write_text("")
    sizes = {"bench": ["--shape", "small"], "bench-model": ["--model", "tiny", "--decode", "1"], "bench-load": []}
    written = refusal(command, *sizes[command], "--out", str(tmp_path / "file" / "results"))
    assert f"{tmp_path / 'file'} cannot be written" in written


def test_the_shell_sees_the_sentence_and_the_exit_code():
    done = run("inspect", "no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "jax-moe-lora: There is no folder no/such/folder; give a model or adapter folder.\n"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is not valid JSON: Expecting property name enclosed in double quotes at character 2"),
        ("[1]", "line 2 holds a JSON list; expected an object"),
        ("[" * 100_000, "line 2 is not valid JSON: it is nested too deeply"),
        (
            '{"prompt": "a>", "max_new_tokens": ' + "9" * 5000 + "}",
            "line 2 is not valid JSON: it has a number",
        ),
        (
            '{"prompt": "a>", "max_new_tokens": ' + "9" * 400 + "}",
            "line 2: max_new_tokens is an endless number; expected 1 to",
        ),
        (
            '{"prompt": "a>", "temperature": ' + "9" * 400 + "}",
            "line 2: temperature is an endless number; expected 0 (greedy)",
        ),
        ('{"prompt": "a>", "prompt": "b>"}', "line 2 has the key 'prompt' twice"),
        (r'{"prompt": "a\ud800>"}', "line 2 holds half of a surrogate pair"),
        ('{"prompt": "a>", "seed": -1}', "line 2: seed is -1; expected 0 to 4294967295"),
        ('{"prompt": ""}', "line 2 is empty; give at least one token"),
        ('{"adapter": "upper"}', 'line 2 has no "prompt" text'),
        ('{"prompt": "a>", "adaptor": "upper"}', "line 2 has adaptor; known are prompt, messages, tools, "),
        ('{"prompt": "a>", "temperature": "hot"}', "line 2: temperature is 'hot'; expected 0 (greedy)"),
        ('{"prompt": "a>", "adapter": 3}', "line 2 has adapter 3"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_nothing_is_written(refusal, tmp_path, line, sentence):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a>"}\n' + line + "\n")
    out = tmp_path / "out.jsonl"
    assert sentence in refusal(
        "generate", "--model", MODEL, "--requests", str(tmp_path / "in.jsonl"), "--out", str(out)
    )
    assert not out.exists()


def test_requests_are_checked_before_the_first_batch_runs(tmp_path, monkeypatch):
    """The bad line is the longest, so it would come last."""
    lines = [{"prompt": "abcdef>" * 20, "max_new_tokens": 10**5}, {"prompt": "a>"}, {"prompt": "b>"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = read_jobs(tmp_path / "in.jsonl", [], None, SamplingParams(max_new_tokens=4))
    model = load_model(MODEL, [], jobs, "float32", 16, "1MiB")
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("a batch ran"))
    with pytest.raises(InputError, match="line 1 has 140 tokens and asks for 100000 more"):
        run_jobs(model, jobs, 1)


def test_requests_say_how_they_are_answered(tmp_path):
    file = tmp_path / "in.jsonl"
    own = {"seed": 9, "stop": ["x"], "min_p": 0.1, "logprobs": 1, "n": 2, "temperature": 1}
    file.write_text("\n".join(json.dumps({"prompt": "a>", **options}) for options in ({}, own, {"stop": "x"})))
    jobs = read_jobs(file, [], None, SamplingParams(seed=5, frequency_penalty=0.5))
    first = SamplingParams(seed=5, frequency_penalty=0.5)
    assert [job.params for job in jobs] == [
        first,
        replace(first, **own),
        replace(first, seed=fold_seed(5, "prompt", 2), stop="x"),
    ]


@pytest.mark.slow
def test_answers_say_what_was_asked_for(tmp_path):
    lines = [{"prompt": "abc>", "n": 2, "temperature": 1.0, "seed": 4}, {"prompt": "abc>", "stop": "b", "logprobs": 1}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = read_jobs(tmp_path / "in.jsonl", [], None, SamplingParams(max_new_tokens=3))
    *samples, last = run_jobs(load_model(MODEL, [], jobs, "float32", 16, "1MiB"), jobs, 2)
    assert [(one["sample"], one["seed"]) for one in samples] == [(0, 4), (1, fold_seed(4, "sample", 1))]
    assert (last["text"], last["stop_reason"], len(last["logprobs"])) == ("a", "b", 2)
    assert set(last) == {*("prompt", "adapter", "text", "finish_reason", "tokens"), "stop_reason", "logprobs"}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "File not found: "),
        ("a folder", "is a folder; name a file"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text at byte 13; save it as UTF-8"),
    ],
)
def test_a_requests_file_that_cannot_be_read_says_why(refusal, tmp_path, content, sentence):
    file = tmp_path / "in.jsonl"
    if content == "a folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    message = refusal("generate", "--model", MODEL, "--requests", str(file))
    assert sentence in message
    assert str(file) in message


def test_a_byte_order_mark_before_requests_is_no_part_of_them(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a>"}')
    assert [job.prompt for job in read_jobs(file, [], None, SamplingParams(max_new_tokens=4))] == ["a>"]


def test_only_a_newline_ends_a_request(tmp_path):
    """U+2028 may stand in a JSON text; a file from Windows ends its lines with a carriage return too."""
    file = tmp_path / "in.jsonl"
    file.write_bytes('{"prompt": "a\u2028b>"}\r\n\r\n{"prompt": "c>"}'.encode())
    jobs = read_jobs(file, [], None, SamplingParams(max_new_tokens=4))
    assert [(job.where, job.prompt) for job in jobs] == [(f"{file}, line 1", "a\u2028b>"), (f"{file}, line 3", "c>")]


def test_no_arguments_show_the_help():
    shown = run()
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in ("demo", "generate", "inspect"))


@pytest.mark.parametrize(
    ("command", "given", "kept"),
    [("inspect", None, "CACHES/jax_moe_lora"), ("inspect", "/mine", "/mine"), ("bench", None, None)],
)
def test_compiled_programs_are_kept_between_runs_but_for_benchmarks(monkeypatch, tmp_path, command, given, kept):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("JAX_COMPILATION_CACHE_DIR", "JAX_MOE_LORA_PROGRAMS"):
        monkeypatch.delenv(variable, raising=False)
        if given is not None:
            monkeypatch.setenv(variable, given)
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", command, "--no-such-option"])
    with pytest.raises(SystemExit):
        main()
    folder = kept and kept.replace("CACHES", str(tmp_path))
    assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == folder
    assert os.environ.get("JAX_MOE_LORA_PROGRAMS") == (folder if given else folder and f"{folder}/programs")
