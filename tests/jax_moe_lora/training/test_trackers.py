"""TensorBoard and Weights & Biases get what `metrics.jsonl` has, through their own libraries and offline."""

import json
import struct
import sys
import time

import pytest

from jax_moe_lora import InputError
from jax_moe_lora.training.trackers import check_trackers, open_trackers, scalars


def lines(*steps: int) -> list[dict]:
    made: list[dict] = []
    for step in steps:
        figures = {name: {"loss": step / divisor, "tokens": 5} for name, divisor in (("sql", 2), ("poet", 4))}
        made.append({"step": step, "adapters": figures})
    return [*made, {"step": steps[-1], "evaluation": {"sql": {"loss": 0.5, "exact_match": 0.25, "examples": 8}}}]


def test_every_figure_of_a_line_has_a_chart_and_an_adapter_of_it_a_curve():
    step, evaluation = lines(4)
    assert scalars(step) == {"loss/sql": 2.0, "loss/poet": 1.0, "tokens/sql": 5, "tokens/poet": 5}
    assert scalars(evaluation) == {"evaluation_loss/sql": 0.5, "evaluation_exact_match/sql": 0.25}


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"log_to is 'wandb', which is not installed; install jax-moe-lora\[wandb\]"):
        check_trackers("wandb")
    with pytest.raises(InputError, match="log_to is 'paper'; expected tensorboard or wandb"):
        check_trackers(["paper"])
    assert check_trackers(()) == ()


@pytest.mark.slow
def test_tensorboard_shows_what_metrics_jsonl_has_when_a_run_is_resumed_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(kept, taken):
        with open_trackers(check_trackers(["tensorboard"]), tmp_path, kept, {}) as sinks:
            for line in taken:
                sinks[0].write(line)
            sinks[0].sync()

    def shown() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        tags = events.Tags()["tensors"]
        return {tag: [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)] for tag in tags}

    write([], lines(1, 2, 3))
    assert shown()["loss/sql"] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert shown()["evaluation_exact_match/sql"] == [(3, 0.25)]
    write(lines(1, 2), lines(3, 4))  # the checkpoint of step 2
    assert shown()["loss/poet"] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert {*shown()} == {f"{figure}/{name}" for figure in ("loss", "tokens") for name in ("sql", "poet")} | {
        "evaluation_loss/sql",
        "evaluation_exact_match/sql",
    }


def records_of(file: bytes) -> list[bytes]:
    """The records of a W&B file of less than one block: LevelDB's log format behind 7 bytes."""
    assert file[:4] == b":W&B"
    assert len(file) < 2**15
    records, at = [], 7
    while at < len(file):
        _, size, kind = struct.unpack_from("<IHB", file, at)
        assert kind == 1, "a record of several parts"
        records.append(file[at + 7 : at + 7 + size])
        at += 7 + size
    return records


@pytest.mark.slow
def test_wandb_gets_the_figures_and_settings_of_a_run_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch):
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for kept, taken in (([], lines(1, 2)), (lines(1, 2), lines(3))):
        time.sleep(1.1)  # W&B names an offline folder after the second in which it was made
        with open_trackers(check_trackers(["wandb"]), tmp_path, kept, {"steps": 3}) as sinks:
            for line in taken:
                sinks[0].write(line)
    wandb.teardown()  # its process ends once everything is on disk
    runs, rows = [], []
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                runs.append((record.run.run_id, {u.key: u.value_json for u in record.run.config.update}.get("steps")))
            if record.HasField("history"):
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert {run_id for run_id, _ in runs} == {(tmp_path / "wandb" / "run_id").read_text()}
    assert "3" in {steps for _, steps in runs}
    assert [(row["_step"], row["loss/sql"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert rows[-1]["evaluation_loss/sql"] == 0.5
