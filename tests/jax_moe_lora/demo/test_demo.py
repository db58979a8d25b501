"""The shipped checkpoint and adapters: the report's promises, and parity with transformers + PEFT."""

import sys

import numpy as np
import pytest

from jax_moe_lora.demo.run import NEW_TOKENS, data_folder, load_demo, run_demo
from jax_moe_lora.demo.tasks import TASKS, heldout_strings, prompt

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.slow, pytest.mark.optimised]


@pytest.fixture(scope="module")
def model():
    return load_demo()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_keeps_what_it_promises(model, dtype):
    report = run_demo(strings=16, model=model if dtype == "float32" else load_demo(dtype))
    assert report.broken == []
    assert report.summary["dtype"] == dtype
    assert set(report.summary["adapters"]) == set(TASKS) - {"base"}
    bound = 0.9 if dtype == "float32" else 0.85
    assert report.summary["base_accuracy"] >= bound
    assert all(f["accuracy"] >= bound and f["other_tasks"] <= 1 - bound for f in report.summary["adapters"].values())
    assert report.summary["mixed_equals_solo"] is True
    assert report.summary["compilations"] == 0
    assert len(report.rows) == 16 * len(TASKS)


def test_a_promise_that_does_not_hold_is_said_and_fails_the_command(monkeypatch, capsys):
    from jax_moe_lora.cli.main import main
    from jax_moe_lora.demo import run

    monkeypatch.setattr(run, "prompt", lambda text: text[::-1] + ">")  # which no adapter was asked for
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", "demo", "--strings", "16", "--dtype", "bfloat16"])
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().out
    assert "bfloat16 on" in said
    assert "Not as promised: The base model answers its task in" in said


def test_adapters_differ_in_layout_rank_and_modules(model):
    ranks = {name: set().union(*info.ranks.values()) for name, info in model.adapters.items()}
    assert len(set(map(frozenset, ranks.values()))) == len(ranks)
    modules = {name: set(info.ranks) for name, info in model.adapters.items()}
    assert modules["upper"] == {"gate", "up", "down"}
    assert modules["reverse"] >= {"q", "k", "v", "o", "router"}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # peft: "rank_pattern keys did not match", which is not so
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_logits_and_greedy_text_equal_transformers_and_peft(model):
    import torch

    from support.networks import load_peft

    names = [None, *model.adapters]
    texts = heldout_strings(len(names))
    encoded = [model.tokenizer.encode(prompt(text) + text) for text in texts]
    lengths = [len(ids) for ids in encoded]
    tokens = np.zeros((len(names), max(lengths)), int)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
    mixed = np.asarray(model.logits(tokens, names, lengths))
    outs = model.generate([prompt(text) for text in texts], names, max_new_tokens=NEW_TOKENS)
    for row, name in enumerate(names):
        network = load_peft(data_folder() / "model", None if name is None else data_folder() / "adapters" / name)
        ids = torch.tensor(encoded[row])[None]
        question = torch.tensor(model.tokenizer.encode(prompt(texts[row])))[None]
        with torch.no_grad():
            expected = network(ids).logits[0].numpy()
            answer = network.generate(
                input_ids=question, attention_mask=torch.ones_like(question), max_new_tokens=NEW_TOKENS, do_sample=False
            )[0, question.shape[1] :].tolist()
        actual = mixed[row, : lengths[row]]
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"
        eos = model.config.eos_token_ids[0]
        assert outs[row].token_ids == (answer[: answer.index(eos)] if eos in answer else answer), name
