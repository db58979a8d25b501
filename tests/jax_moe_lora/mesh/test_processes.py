"""Several processes give the answers of one, decide everything together, and end together."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from jax_moe_lora.models.sites import layer_sites
from support.checkpoints import write
from support.meshes import random_adapter, relative
from support.process_models import NAMES, PROMPTS, answers, load, own_loop
from support.processes import run_processes

CHANGES = {
    "num_hidden_layers": 1,
    "mlp_only_layers": [],
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "intermediate_size": 16,
    "head_dim": 4,
    "hidden_size": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and three adapters for it."""
    folder = tmp_path_factory.mktemp("processes")
    write(folder / "model", **CHANGES)
    model = load_without_adapters(folder)
    sites = layer_sites(model.config)
    for seed, name in enumerate("abc"):
        adapter = random_adapter("per_expert", sites, seed, rank=12)
        strong = {key: replace(weights, scale=30 * weights.scale) for key, weights in adapter.weights.items()}
        model.save_adapter(replace(adapter, weights=strong), folder / name)
    return folder


def load_without_adapters(folder):
    from jax_moe_lora import Model

    return Model.from_pretrained(folder / "model", dtype="float32", max_adapters=1, max_rank=32)


@pytest.mark.slow(120)
def test_two_processes_give_the_answers_of_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "of")
    model = load(folder, None)
    wanted = answers(model, NAMES)
    reports = run_processes(2, 2, "process_models", str(tmp_path / "of"), "expert=2,tensor=2")
    first = reports[0]
    of_each = {"read", "parts", "broken", "other_prompts", "bad_prompt", "missing"}
    for number, report in enumerate(reports):
        same = [name for name in first.keys() - of_each if report[name] != first[name]]
        assert not same, f"process {number} differs in {same}"
        assert report["read"] == report["parts"], "bytes of weights that this process does not have"
    assert sum(report["read"] for report in reports) < 2 * written(folder)

    assert first["answers"] == first["reloaded"] == wanted
    assert first["base"] == answers(model, [None] * 5) != wanted
    assert relative(first["loop"], own_loop(model)) < 1e-5
    assert (
        first["stream"]
        == model.generate(PROMPTS[:1], ["a"], max_new_tokens=6, ignore_eos=True, pad_to=(8, 16))[0].token_ids
    )
    assert [sorted(slots) for slots in first["slots"]] == [["a", "b"], ["a", "c"], ["a", "b"]] * 2
    assert first["compilations"] == 0
    assert len({seed for seed, *_ in first["sampled"]}) == len(PROMPTS)

    for number, report in enumerate(reports):
        kind, sentence = report["broken"]
        assert kind == "AdapterFormatError"
        assert "nothing" in sentence
        assert sentence.startswith("Process 1: ") or number > 0
        assert report["missing"][0] == "CheckpointError"
        assert "There is no folder" in report["missing"][1]
        assert report["other_prompts"][0] == "ProcessError"
        assert "was given something else than process" in report["other_prompts"][1]
        assert report["bad_prompt"][0] == "InputError"
        assert "Prompt 0 is empty" in report["bad_prompt"][1]
    assert first["others_answered"] == [wanted[1], first["base"][2], *wanted[3:]]
    assert "expert=1" not in first["small_mesh"][1]
    assert "devices of 1 of" in first["small_mesh"][1]
    assert first["changed"] == answers(model, [None, "a", "c", "a", None]) != wanted
    np.testing.assert_allclose(first["on_the_host"], np.abs(model.adapter("a").weights[0, "gate"].a).sum(), rtol=1e-6)


def written(folder):
    return sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
