"""Training on a mesh: gradients, optimizers and adapters of eight CPU devices are those of one."""

import pytest

from jax_moe_lora import InputError
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.serving import model
from jax_moe_lora.training import AdapterSpec, layout
from support.meshes import run_on_devices

MESHES = ["data=2,expert=2,tensor=2", "expert=8"]


@pytest.mark.slow(40)
def test_a_training_step_on_a_mesh_equals_that_of_one_device(tmp_path):
    reports = run_on_devices(8, "mesh_training", str(tmp_path / "checkpoints"), *MESHES)
    assert [report["mesh"] for report in reports] == MESHES
    for report in reports:
        for figure in ("gradients", "params", "metrics"):
            assert max(report[figure].values()) < 1e-5, report
        assert report["moved"] > 1e-4, report
        assert report["continued"], report
        assert {*report["collectives"]} == {"all-reduce"}, report
    share = reports[0]["share"]
    # An expert's matrices lie with the expert, its columns with the weight's; what is shared is whole.
    assert {name: share[f"fused {name}"] for name in ("gate_up.a", "up.b", "down.a", "down.b", "q.b", "q.a")} == {
        "gate_up.a": 1 / 2,
        "up.b": 1 / 4,
        "down.a": 1 / 4,
        "down.b": 1 / 2,
        "q.b": 1 / 2,
        "q.a": 1,
    }
    assert (share["outer gate.a"], share["outer gate.b"], share["outer shared_gate.b"]) == (1, 1 / 4, 1 / 4)
    assert reports[1]["share"]["experts down.b"] == 1 / 8


@pytest.mark.slow(30)
def test_a_trainer_on_a_mesh_writes_the_adapters_of_one_device_and_goes_on_where_it_stopped(tmp_path):
    (report,) = run_on_devices(8, "mesh_trainer", str(tmp_path), "data=2,expert=2,tensor=2")
    for figure in ("adapters", "losses", "evaluated"):
        assert report[figure] < 1e-5, report
    assert report["digests"], report
    assert report["resumed"], report
    assert "mesh.data was 2 and is 'none'" in report["other_mesh"]
    assert report["rows"] == "A micro-batch has 3 rows, which the mesh's data=2 does not divide; give a multiple."
    assert "expert=8 does not divide the 4 experts" in report["experts"]


def test_the_devices_of_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(layout, "across", lambda mesh: True)
    with pytest.raises(InputError, match="The mesh has devices of several processes; training takes those of one"):
        layout.step_layout(read_model_config(data_folder() / "model"), {"new": AdapterSpec()}, "data=1")
    monkeypatch.setattr(model, "across", lambda mesh: True)
    with pytest.raises(InputError, match="max_replacements need the devices of one process"):
        model.Model.from_pretrained(data_folder() / "model", mesh="data=1", max_replacements=1)
