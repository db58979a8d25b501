"""`jax-moe-lora train` and `Trainer`: what a run leaves, and one sentence with exit code 2 on bad options."""

import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, InputError, Model
from jax_moe_lora.cli.main import main
from jax_moe_lora.cli.options import values_by_name
from jax_moe_lora.cli.train import ProgressBars
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.demo.tasks import TASKS, heldout_strings, prompt
from jax_moe_lora.training.log import Progress
from jax_moe_lora.training.recipe import Recipe
from jax_moe_lora.training.scoring import Evaluation
from jax_moe_lora.training.spec import AdapterSpec
from jax_moe_lora.training.trainer import Trainer
from support.kill_training import write_task

pytestmark = pytest.mark.xdist_group("train")
MODEL = data_folder() / "model"
UPPER = data_folder() / "adapters" / "upper"
LINES = [{"prompt": "ab>", "completion": "AB"}, {"prompt": "xyz>", "completion": "XYZ"}, {"text": "a text"}]


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """The one line that a refused command writes to standard error; nothing is left of it on disk."""
    write_task(tmp_path / "x.jsonl", "upper", 8)
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments: str) -> str:
        given = ["--model", str(MODEL), "--adapter", "x=x.jsonl", "--out", "out", "--steps", "10"]
        monkeypatch.setattr(
            sys, "argv", ["jax-moe-lora", "train", *given, *(a.replace("UPPER", str(UPPER)) for a in arguments)]
        )
        with pytest.raises(SystemExit) as exit:
            main()
        written = capsys.readouterr()
        assert (exit.value.code, written.out) == (2, "")
        assert len(written.err.splitlines()) == 1 or "cannot be trained on:" in written.err
        assert not Path("out", "x").exists()
        return written.err

    return refuse


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "y"], "--adapter 'y' is not NAME=FILE.jsonl"),
        (["--adapter", "x=x.jsonl"], "--adapter 'x' is given twice"),
        (["--adapter", "y=none.jsonl"], "File not found: none.jsonl"),
        (["--adapter", "a/b=x.jsonl"], "Adapter name 'a/b' cannot be a folder's"),
        (["--adapter", "checkpoints=x.jsonl"], "Adapter name 'checkpoints' cannot be a folder's"),
        (["--adapter", ".x=x.jsonl"], "Adapter name '.x' cannot be a folder's"),
        (["--model", "nowhere"], "There is no folder nowhere"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--rank", "many"], "--rank many is not a whole number"),
        (["--rank", "0"], "rank of adapter 'x' is 0; expected 1"),
        (["--rank", "1000000"], "rank of gate of adapter 'x' is 1000000; expected at most 64, its larger width"),
        (["--rank", "y=4"], "--rank y=4 names 'y', which no --adapter does"),
        (["--rank", "4", "--rank", "8"], "--rank is given twice for all adapters"),
        (["--rank", "x=4", "--rank", "x=8"], "--rank is given twice for 'x'"),
        (["--alpha", "-1"], "alpha of adapter 'x' is -1.0; expected a number above zero"),
        (["--alpha", "1e31"], "alpha of adapter 'x' is 1e+31; expected a number above zero, 1e+30 at most"),
        (["--lr", "x=fast"], "--lr x=fast is not a number"),
        (["--lr", "nan"], "learning rate of adapter 'x' is nan; expected a number above zero"),
        (["--layout", "round"], "layout of adapter 'x' is 'round'; expected one of fused, per-expert, shared-outer"),
        (["--targets", "gate,head"], "targets of adapter 'x' name 'head', which this model lacks; expected q, k"),
        (["--targets", ""], "targets of adapter 'x' are empty"),
        (["--schedule", "sawtooth"], "schedule of adapter 'x' is 'sawtooth'; expected one of constant, cosine, linear"),
        (["--warmup", "10"], "warmup of adapter 'x' is 10 of 10 steps"),
        (["--weight-decay", "-0.1"], "weight decay of adapter 'x' is -0.1; expected a number from zero"),
        (["--clip", "0"], "clip of adapter 'x' is 0.0; expected a number above zero"),
        (["--init", "zeros"], "init of adapter 'x' is 'zeros'; expected one of kaiming, gaussian"),
        (["--dtype", "int8"], "dtype is 'int8'; expected one of float32, bfloat16"),
        (["--dtype", "float16"], "dtype is 'float16', which has no room for gradients; use bfloat16 or float32"),
        (["--batch-size", "1", "--adapter", "y=x.jsonl"], "batch_size is 1 for 2 adapters"),
        (["--batch-size", "8", "--micro-batches", "3"], "batch_size is 8, which 3 micro_batches do not divide"),
        (["--sequence-length", "1000"], "sequence_length is 1000; expected 1 to 256"),
        (["--epochs", "2"], "steps is 10 and epochs is 2.0; give one of them"),
        (["--extra-columns", "keep"], "extra_columns is 'keep'; expected refuse or ignore"),
        (["--log-to", "paper"], "log_to is 'paper'; expected tensorboard or wandb"),
        (["--from-adapter", "y=none"], "--from-adapter names 'y', which no --adapter does"),
        (["--from-adapter", "x=none"], "There is no folder none"),
        (
            ["--from-adapter", "x=UPPER", "--rank", "4"],
            "rank of gate is 8 there and 4 in the recipe; rank of up is 8",
        ),
        (
            ["--from-adapter", "x=UPPER", "--targets", "gate,up"],
            "targets is gate, up, down there and gate, up in the",
        ),
        (["--from-adapter", "x=UPPER", "--alpha", "3"], "scale of gate is 2 there and 0.375 in the recipe"),
        (
            ["--from-adapter", "x=UPPER", "--layout", "per-expert"],
            "layout is fused there and per-expert in the recipe",
        ),
        (["--eval", "y=x.jsonl"], "--eval names 'y', which no --adapter does"),
        (["--eval", "z=x.jsonl", "--eval", "y=x.jsonl"], "--eval names 'y', which no --adapter does"),
        (["--eval", "x=none.jsonl"], "File not found: none.jsonl"),
        (["--write-as", "onnx"], "write_as is 'onnx'; expected one of peft, peft-per-expert, tinker, tensorrt-llm"),
        (["--out", "no/out"], "there is no folder no"),
        (["--out", "."], ". exists; go on with its run (--resume, resume=True), or name a new folder"),
        (["--out", ".", "--resume"], ". has files but no run; name another folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_sentence_before_any_work(refusal, monkeypatch, arguments, said):
    from jax_moe_lora.training import trainer

    def load(*_):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(trainer, "load_params", load)
    assert said in refusal(*arguments)
    assert not Path("out").exists()


def test_bad_lines_stop_a_run_before_it_makes_anything(refusal):
    Path("y.jsonl").write_text('{"prompt": "a>", "completion": "A"}\n{"prompt": "a>"}\nnonsense\n')
    first, second, third, advice = refusal("--adapter", "y=y.jsonl").splitlines()
    assert first == "jax-moe-lora: 2 lines cannot be trained on:"
    assert second == "  y.jsonl, line 2 lacks completion"
    assert third.startswith("  y.jsonl, line 3 is not valid JSON")
    assert "--skip-bad-lines" in advice
    assert "  x.jsonl, line 1 has" in refusal("--sequence-length", "3")
    assert not Path("out").exists()


def test_an_option_is_for_all_adapters_or_for_one():
    assert values_by_name("--rank", None, ("a", "b"), int, 16) == {"a": 16, "b": 16}
    assert values_by_name("--rank", ["4"], ("a", "b"), int, 16) == {"a": 4, "b": 4}
    assert values_by_name("--rank", ["b=2", "4"], ("a", "b"), int, 16) == {"a": 4, "b": 2}


class Written(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_loss_and_tokens_a_second_of_each_adapter(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stderr", written := Written(terminal))
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBars(("sql", "poet"), 20) as shown:
        for step in (10, 20):
            done = {"sql": Evaluation(0.5, 0.25, 8)} if step == 20 else {}
            shown(Progress(step, 20, {"sql": 1.25, "poet": 2.5}, {"sql": 1234.5, "poet": 99.0}, done))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.getvalue())
    assert "step 20/20: sql evaluation loss 0.5000, 25.0% of 8 exact" in text
    for line in (r"sql .*loss 1\.2500.* 1,234 tokens/s", r"poet .*loss 2\.5000.* 99 tokens/s", "20/20"):
        assert re.search(line, text), text
    assert ("step 10/20: sql loss 1.2500 1,234 tokens/s; poet loss" in text) != terminal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two adapters of different layouts, ranks and targets, after some steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipes = {
        "both": Recipe(AdapterSpec(4, 8.0, targets=("gate", "up", "down", "q", "o")), 1e-2, warmup=2),
        "outer": Recipe(AdapterSpec(3, 6.0, "shared-outer"), 3e-3, "constant"),
    }
    trainer = Trainer(
        MODEL,
        {"both": LINES, "outer": LINES[:2]},
        steps=12,
        recipe=recipes,
        evaluation={"outer": LINES[:2]},
        batch_size=4,
        micro_batches=2,
        sequence_length=16,
        router_loss=0.01,
        dtype="float32",
    )
    told = []
    trainer.run(out, save_every=5, evaluate_every=6, log_to=["tensorboard"], report=told.append)
    return trainer, out, told


@pytest.mark.slow
def test_a_run_leaves_adapters_metrics_and_its_last_checkpoints(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out, told = trained
    assert sorted(path.name for path in out.iterdir()) == [
        "both",
        "checkpoints",
        "metrics.jsonl",
        "outer",
        "tensorboard",
    ]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["10", "12"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "adapters" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:
        for name, share in (("both", 2), ("outer", 2)):
            own = line["adapters"][name]
            assert own["loss"] > 0
            assert own["router_loss"] > 0
            assert own["gradient_norm"] > 0
            assert own["tokens"] >= share
    events = EventAccumulator(str(out / "tensorboard"), {"tensors": 0}).Reload()  # 0: all of them
    charts = {tag: [e.tensor_proto.float_val[0] for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    for name, figure in itertools.product(("both", "outer"), steps[0]["adapters"]["both"]):
        expected = [line["adapters"][name][figure] for line in steps]
        np.testing.assert_allclose(charts[f"{figure}/{name}"], expected, rtol=1e-6)
    assert len(charts["evaluation_exact_match/outer"]) == 2
    rates = [line["adapters"]["both"]["learning_rate"] for line in steps]
    np.testing.assert_allclose(rates[:3], [1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-5)
    np.testing.assert_allclose([line["adapters"]["outer"]["learning_rate"] for line in steps], 3e-3, rtol=1e-6)
    evaluated = [line for line in lines if "evaluation" in line]
    assert [(line["step"], set(line["evaluation"])) for line in evaluated] == [(6, {"outer"}), (12, {"outer"})]
    assert [done.step for done in told] == [5, 6, 10, 12]
    assert told[-1].evaluations["outer"].examples == 2
    assert all(rate > 0 for done in told for rate in done.rates.values())


@pytest.mark.slow
def test_what_a_run_writes_is_what_it_trained(trained):
    """Loaded from disk into a model that serves, both adapters give the losses of the last evaluation."""
    trainer, out, told = trained
    model = Model.from_pretrained(MODEL, dtype="float32")
    for name in ("both", "outer"):
        model.load_adapter(out / name, adapter_name=name)
    losses = []
    for line in LINES[:2]:
        before, after = model.tokenizer.encode_pair(line["prompt"], line["completion"])
        tokens = [*before, *after, model.config.eos_token_ids[0]]
        scores = np.asarray(model.logits([tokens[:-1]], ["outer"]))[0].astype(np.float64)
        for index in range(len(before) - 1, len(tokens) - 1):
            row = scores[index]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[index + 1]])
    np.testing.assert_allclose(told[-1].evaluations["outer"].loss, np.mean(losses), rtol=1e-5)
    held = model.logits([tokens[:-1]], ["both"])
    model.unload_adapter("both")
    model.load_adapter(trainer.adapter("both"), adapter_name="both")
    np.testing.assert_array_equal(model.logits([tokens[:-1]], ["both"]), held)
    assert (np.asarray(held) != np.asarray(model.logits([tokens[:-1]]))).any()


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_writes_the_same_bytes(trained, tmp_path):
    trainer, out, _ = trained
    before = {path: path.read_bytes() for name in ("both", "outer") for path in (out / name).iterdir()}
    with pytest.raises(InputError, match="exists; go on with its run"):
        trainer.run(out)
    trainer.step, trainer.state = 0, jax.tree.map(jnp.zeros_like, trainer.state)
    trainer.run(out, resume=True, save_every=5)
    assert trainer.step == 12
    assert {path: path.read_bytes() for path in before} == before


def test_what_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch):
    uneven = AdapterSpec(4, layout="shared-outer", ranks=(("down", 2),))
    trainer = Trainer(MODEL, {"x": LINES[:2]}, steps=1, recipe=Recipe(uneven), sequence_length=16, dtype="float32")
    monkeypatch.setattr(trainer, "train_step", lambda: pytest.fail("a step was trained"))
    with pytest.raises(AdapterFormatError, match=r"'x' cannot be written as Tinker.*: layer 0, .* one rank for all"):
        trainer.run(tmp_path / "out")
    with pytest.raises(InputError, match="write_as is 'onnx'; expected one of peft, "):
        trainer.run(tmp_path / "out", write_as="onnx")
    with pytest.raises(InputError, match="evaluate_every is 0; expected 1 to"):
        trainer.run(tmp_path / "out", write_as="peft", evaluate_every=0)
    assert not (tmp_path / "out").exists()
    assert trainer.write(tmp_path, "peft") != []


@pytest.mark.slow
def test_a_refusal_of_the_system_is_one_sentence_and_the_run_goes_on_after_it(tmp_path):
    out, sizes = tmp_path / "out", {"batch_size": 1, "sequence_length": 16, "dtype": "float32"}
    trainer = Trainer(MODEL, {"x": LINES[:2]}, steps=3, recipe=Recipe(AdapterSpec(2)), **sizes)
    (out / "checkpoints").mkdir(parents=True)
    (out / f".metrics.jsonl.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"out cannot be written: No space left on device; once it can, go on"):
        trainer.run(out, resume=True)
    (out / "metrics.jsonl").unlink()
    trainer.step = 0
    trainer.run(out, resume=True, save_every=1)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert Model.from_pretrained(MODEL, dtype="float32").load_adapter(out / "x", adapter_name="x") is not None


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_before(tmp_path):
    lost = Recipe(AdapterSpec(2, 4.0), 1e30, "constant", clip=None)
    recipes = {"x": lost, "good": Recipe(AdapterSpec(2, 4.0)), "z": lost}
    data, sizes = dict.fromkeys(recipes, LINES[:2]), {"batch_size": 3, "sequence_length": 16, "dtype": "float32"}
    trainer = Trainer(MODEL, data, steps=9, recipe=recipes, **sizes)
    out = tmp_path / "out"
    named = r"At step (\d+) these adapters are no longer finite: 'x' \(loss .*\), 'z' \(loss .*\); begin again with"
    with pytest.raises(InputError, match=named) as stopped:
        trainer.run(out, save_every=1)
    step = int(re.match(named, str(stopped.value))[1])
    assert step > 1
    assert str(step - 1) in {path.name for path in (out / "checkpoints").iterdir()}
    assert not any((out / name).exists() for name in recipes)
    fresh = Trainer(MODEL, data, steps=9, recipe=recipes, **sizes)
    with pytest.raises(InputError, match=named):
        fresh.run(tmp_path / "seldom", save_every=9)
    for folder in (out, tmp_path / "seldom"):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines] == list(range(1, step))


@pytest.mark.slow(50)
@pytest.mark.optimised  # hundreds of steps, each of which takes a quarter of the time
def test_the_demos_tasks_are_learnt_in_one_run(tmp_path):
    names = ("upper", "reverse", "shift")
    data = {name: write_task(tmp_path / f"{name}.jsonl", name, 4_000) for name in names}
    texts = heldout_strings(48)
    held_out = {name: [{"prompt": prompt(t), "completion": TASKS[name](t)} for t in texts] for name in names}
    trainer = Trainer(MODEL, data, evaluation=held_out, dtype="float32", **DEMO)
    told = []
    trainer.run(tmp_path / "out", report=told.append)
    assert {name: own.exact_match >= 0.95 for name, own in told[-1].evaluations.items()} == dict.fromkeys(names, True)
    model = Model.from_pretrained(MODEL, dtype="float32")
    for name in names:
        model.load_adapter(tmp_path / "out" / name, adapter_name=name)
    asked = [(text, name) for text in texts[:16] for name in names]
    answers = model.generate([prompt(text) for text, _ in asked], [name for _, name in asked], max_new_tokens=10)
    for name in names:
        right = [TASKS[name](text) == out.text for (text, own), out in zip(asked, answers, strict=True) if own == name]
        assert np.mean(right) >= 0.95, name


EVERYWHERE = ("gate", "up", "down", "q", "k", "v", "o")
DEMO = {
    "steps": 340,
    "recipe": Recipe(AdapterSpec(16, 32.0, targets=EVERYWHERE), 5e-3, warmup=30),
    "batch_size": 12,
    "sequence_length": 96,
}
