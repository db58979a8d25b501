"""Where jax has no device, one sentence says so before the work that needs one."""

import os
import subprocess
import sys

import jax
import pytest

from jax_moe_lora import DeviceError, Model, Site, create_bank
from jax_moe_lora.cli.main import main
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.devices import require_device
from jax_moe_lora.training import Trainer

MODEL = str(data_folder() / "model")
REASON = "Unable to initialize backend 'cuda': no supported devices found for platform CUDA."


@pytest.fixture
def no_device(monkeypatch):
    def devices(backend=None):
        raise RuntimeError(f"{REASON} (set JAX_PLATFORMS='' to automatically choose an available backend)")

    monkeypatch.setattr(jax, "devices", devices)


def test_the_device_is_the_one_that_calls_run_on():
    assert require_device() == jax.devices()[0]
    with jax.default_device(jax.devices("cpu")[-1]):
        assert require_device() == jax.devices("cpu")[-1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: Model.from_pretrained(MODEL),
        lambda: create_bank({"gate": Site(64, 64, 4, (0,))}, 1, 16),
        lambda: Trainer(MODEL, {"sql": [{"prompt": "abc>", "completion": "ABC"}]}, steps=1),
    ],
    ids=["a model", "a bank", "a trainer"],
)
def test_the_library_raises_its_own_error(no_device, call):
    with pytest.raises(DeviceError, match="no supported devices found for platform CUDA; unset it"):
        call()


def test_jax_may_refuse_without_a_word(monkeypatch):
    def devices(backend=None):
        raise AssertionError  # jax 0.11, for JAX_PLATFORMS=cuda without its CUDA plugin

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(DeviceError, match="that platform is not installed"):
        require_device()


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["generate", "--model", MODEL, "--prompt", "abc>"],
        ["train", "--model", MODEL, "--adapter", "sql=no-such.jsonl", "--out", "out", "--steps", "1"],
        ["bench", "--shape", "small"],
        ["bench-load", "--model", "tiny"],
        ["bench-model", "--model", "tiny"],
        ["bench-train", "--model", "tiny"],
        ["tune", "--out", "tuned.json", "--shape", "small"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_computes_says_so(no_device, arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    written = capsys.readouterr()
    assert (exit.value.code, written.out, list(tmp_path.iterdir())) == (2, "", [])
    (line,) = written.err.splitlines()
    assert REASON.rstrip(".") in line


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_sentence(platform):
    environment = {**os.environ, "JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "jax_moe_lora.cli.main", "generate", "--model", MODEL, "--prompt", "abc>"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"JAX_PLATFORMS={platform!r}" in line
