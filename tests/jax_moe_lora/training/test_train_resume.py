"""Runs that are killed, refused and resumed: the same bits as one that nobody killed, or one sentence."""

import json
import os
import random
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jax_moe_lora import CheckpointError, InputError
from jax_moe_lora.training.checkpoint import Checkpoints
from jax_moe_lora.training.recipe import Recipe
from jax_moe_lora.training.run_folder import MetricsFile, check_out, run_folder
from jax_moe_lora.training.step import TrainState
from support.kill_training import NAMES, command, digests, finish, kill, some_time_after_a_checkpoint, start, write_task

pytestmark = pytest.mark.optimised

STEPS = 12


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_is_not(tmp_path):
    for name in NAMES:
        write_task(tmp_path / f"{name}.jsonl", name)
    finish(start(tmp_path, tmp_path / "whole", STEPS))
    out, killed = tmp_path / "killed", False
    while not killed or any((out / name).exists() for name in NAMES):  # it ended, or nearly so, before it was killed
        shutil.rmtree(out, ignore_errors=True)
        when = some_time_after_a_checkpoint(out, random.Random(), seconds=0.5)
        killed = kill(start(tmp_path, out, STEPS), when)
    finish(start(tmp_path, out, STEPS))
    assert digests(out) == digests(tmp_path / "whole")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [str(STEPS - 1), str(STEPS)]


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_where_there_is_room(tmp_path):
    for name in NAMES:
        write_task(tmp_path / f"{name}.jsonl", name)
    whole = command(tmp_path, tmp_path / "out", 4, "--resume", "--rank", "upper=32")
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "limited", *whole]  # KiB a file; a checkpoint has more
    refused = subprocess.run(limited, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    assert refused.stderr.count("jax-moe-lora: ") == 1, refused.stderr
    # Other threads' logs may stand before and after it in its line.
    said = refused.stderr.partition("jax-moe-lora: ")[2]
    assert re.match(r".*out cannot be written: .*File too large.*; once it can, go on with --resume\.", said), said
    assert subprocess.run(whole, capture_output=True).returncode == 0
    assert all((tmp_path / "out" / name / "adapter_config.json").is_file() for name in NAMES)


def state(value: float) -> TrainState:
    params = {"x": {"0.gate.a": jax.numpy.full((2, 3, 4), value, "float32"), "0.gate.b": jax.numpy.ones((2, 3, 4))}}
    import optax

    return TrainState(params, {"x": optax.adamw(1e-3).init(params["x"])}, {"x": jax.numpy.int32(7)})


SETTINGS = {"seed": 1, "adapters": {"x": {"rank": 4, "ranks": (("up", 3),)}, "y": {"rank": 2}}}


def test_a_checkpoint_gives_back_the_bits_that_it_was_given(tmp_path):
    odd = state(np.nextafter(np.float32(0.1), np.float32(1)))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(odd, SETTINGS) is None
        for step in (1, 2, 3):
            checkpoints.save(step, odd if step == 3 else state(step), SETTINGS)
        checkpoints.save(3, state(9), SETTINGS)  # is there already
    with Checkpoints(tmp_path / "c") as checkpoints:
        step, held = checkpoints.restore(state(0), SETTINGS)
    assert step == 3
    assert jax.tree.structure(held) == jax.tree.structure(odd)
    for mine, own in zip(jax.tree.leaves(held), jax.tree.leaves(odd), strict=True):
        assert mine.dtype == own.dtype
        np.testing.assert_array_equal(mine, own)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["2", "3"]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state(0), SETTINGS)
        other = {"seed": 2, "adapters": {"x": {"rank": 4, "ranks": (("up", 5),)}, "z": {"rank": 2}}}
        with pytest.raises(InputError) as refused:
            checkpoints.restore(state(0), other)
    message = str(refused.value)
    assert message.startswith(f"The run in {tmp_path} was started with other settings: seed was 1 and is 2; ")
    assert "adapters.x.ranks was [['up', 3]] and is [['up', 5]]" in message
    assert "adapters.y.rank was 2 and is 'none'; adapters.z.rank was 'none' and is 2" in message
    assert "adapters.x.rank " not in message


def test_what_a_killed_process_leaves_is_no_checkpoint(tmp_path):
    folder = tmp_path / "c"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), SETTINGS)
    left = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", left)
    shutil.rmtree(folder / "1" / "state")  # its removal had begun
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 2
        assert float(checkpoints.restore(state(0), SETTINGS)[1].params["x"]["0.gate.a"][0, 0, 0]) == 2
        checkpoints.save(3, state(3), SETTINGS)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_a_broken_checkpoint_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state(1), SETTINGS)
        for path in (tmp_path / "c" / "1" / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
        named = r"c/1 cannot be read: .* remove it to continue from the one before it"
        with pytest.raises(CheckpointError, match=named):
            checkpoints.restore(state(0), SETTINGS)


def test_a_run_takes_no_folder_that_is_not_its_own(tmp_path):
    check_out(tmp_path / "new", resume=False)
    check_out(tmp_path / "new", resume=True)
    with pytest.raises(InputError, match="there is no folder"):
        check_out(tmp_path / "no" / "new", resume=False)
    with run_folder(tmp_path / "run", resume=False):
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    check_out(tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="run exists; go on with its run"):
        check_out(tmp_path / "run", resume=False)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="other has files but no run"):
        check_out(tmp_path / "other", resume=True)
    with pytest.raises(InputError, match=r"thesis.tex is not a directory"):
        check_out(tmp_path / "other" / "thesis.tex", resume=True)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (
        run_folder(tmp_path / "run", resume=False),
        pytest.raises(InputError, match="being written by another run"),
        run_folder(tmp_path / "run", resume=True),
    ):
        pass
    with run_folder(tmp_path / "run", resume=True):
        pass


def test_metrics_go_on_where_the_checkpoint_does(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1}, {"step": 1, "evaluation": {}}, {"step": 2}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    with MetricsFile(path, 2) as file:
        file.write({"step": 3, "again": True})
        file.sync()
        assert [json.loads(line) for line in path.read_text().splitlines()] == [*lines[:3], {"step": 3, "again": True}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_rate_rises_in_the_warmup_and_ends_as_its_schedule_says(schedule):
    rate = Recipe(learning_rate=0.1, schedule=schedule, warmup=4).schedule_of(20)
    found = np.array([rate(step) for step in range(21)])
    np.testing.assert_allclose(found[:5], [0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-5)
    end, middle = {"constant": (0.1, 0.1), "cosine": (0, 0.05), "linear": (0, 0.05)}[schedule]
    np.testing.assert_allclose([found[12], found[20]], [middle, end], atol=1e-7)
