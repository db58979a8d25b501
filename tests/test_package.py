"""The wheel, installed outside the clone, carries the demo, and the demo keeps its promises."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import ROOT

UV = shutil.which("uv") or str(ROOT / ".uv" / "bin" / "uv")


def run(*command: str, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("wheel")
def test_the_wheel_runs_the_demo_outside_the_clone(tmp_path):
    run(UV, "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 12 * 2**20
    tuned = {str(path.relative_to(ROOT)) for path in (ROOT / "pallas_kernels" / "tuned").iterdir()}
    assert tuned <= set(zipfile.ZipFile(wheel).namelist())
    run(UV, "venv", "--quiet", "--python", sys.executable, "fresh", cwd=tmp_path)
    python = str(tmp_path / "fresh" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    run(UV, "pip", "install", "--quiet", "--python", python, "--constraint", constraints, str(wheel), cwd=tmp_path)
    where = run(python, "-c", "import jax_moe_lora; print(jax_moe_lora.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    command = str(tmp_path / "fresh" / "bin" / "jax-moe-lora")
    shown = run(command, "demo", "--json", "report.json", cwd=tmp_path, PYTHONPATH="")
    assert "bit for bit: yes" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    check_report(report)


def check_report(report: dict) -> None:
    """What the README promises of the demo."""
    assert len(report["adapters"]) >= 3
    assert report["base_accuracy"] >= 0.95
    for name, figures in report["adapters"].items():
        assert figures["accuracy"] >= 0.95, name
        assert figures["other_tasks"] <= 0.05, name
    assert report["mixed_equals_solo"] is True
    assert report["compilations"] == 0
    assert report["tokens_per_second"] > 0


def test_nothing_of_this_machine_is_in_the_demo_data():
    from jax_moe_lora.demo.run import data_folder

    files = [path for path in data_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    for path in files:
        if path.suffix == ".json":
            text = path.read_text()
            assert not any(part in text for part in ("/home/", "/root/", "/work/", "/tmp/")), path
