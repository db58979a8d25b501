"""`make t` selects the tests that a change may break."""

import subprocess
from pathlib import Path

import pytest

from support import ROOT
from support.affected import affected, changed_files, importers_in, merge_base

TESTS = ("layer/test_moe.py", "layer/test_nn.py", "models/test_decoder.py", "files/test_io.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A library of three folders with their tests, one support module used through another, and a README."""
    for name in TESTS:
        path = tmp_path / "tests" / "jax_moe_lora" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "tests" / "test_readme.py").write_text("")
    support = tmp_path / "tests" / "support"
    support.mkdir()
    (support / "arrays.py").write_text("")
    (support / "layers.py").write_text("from support.arrays import draw\n")
    (tmp_path / "tests" / "jax_moe_lora" / "layer" / "test_nn.py").write_text("from support import layers\n")
    (tmp_path / "jax_moe_lora" / "files" / "deep").mkdir(parents=True)
    return tmp_path


IMPORTS = {"jax_moe_lora.layer.moe": {"jax_moe_lora.models.decoder"}}


def select(tree: Path, *changed: str) -> set[str]:
    found = affected(tree, changed, lambda module: IMPORTS.get(module, ()))
    return {name.removeprefix("tests/").removeprefix("jax_moe_lora/") for name in found}


@pytest.mark.parametrize(
    ("changed", "selected"),
    [
        ("jax_moe_lora/layer/moe.py", {"layer/test_moe.py", "layer/test_nn.py", "models/test_decoder.py"}),
        ("jax_moe_lora/models/decoder.py", {"models/test_decoder.py"}),
        ("jax_moe_lora/files/deep/reader.py", {"files/test_io.py"}),
        ("jax_moe_lora/files/sizes.json", {"files/test_io.py"}),
        ("tests/jax_moe_lora/layer/test_moe.py", {"layer/test_moe.py"}),
        ("tests/jax_moe_lora/layer/test_gone.py", {"test_readme.py"}),
        ("tests/support/arrays.py", {"layer/test_nn.py"}),
        ("README.md", {"test_readme.py"}),
        ("pyproject.toml", {*TESTS, "test_readme.py"}),
        ("tests/pallas_kernels/conftest.py", {*TESTS, "test_readme.py"}),
    ],
)
def test_a_change_selects_its_folder_and_those_that_import_it(tree, changed, selected):
    assert select(tree, changed) == selected


def test_no_change_selects_nothing(tree):
    assert select(tree) == set()


def test_a_change_is_all_since_the_merge_base_committed_or_not(tmp_path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def write(name: str, text: str = "1") -> None:
        (tmp_path / name).write_text(text)
        git("add", name)

    git("init", "-b", "main")
    for name in ("same", "edited", "removed", ".gitignore"):
        write(name, "ignored")
    git("commit", "-m", "base")
    git("checkout", "-b", "work")
    write("committed")
    git("commit", "-m", "work")
    git("checkout", "main")
    write("elsewhere")
    git("commit", "-m", "another's work")
    git("checkout", "work")
    write("staged")
    (tmp_path / "edited").write_text("2")
    (tmp_path / "removed").unlink()
    (tmp_path / "untracked").write_text("")
    (tmp_path / "ignored").write_text("")
    assert changed_files(tmp_path) == {"committed", "staged", "edited", "removed", "untracked"}


def test_a_folder_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is not a git repository"):
        merge_base(tmp_path)


def test_on_this_tree_a_training_step_selects_training_and_the_command_line_and_no_kernels():
    found = affected(ROOT, ["jax_moe_lora/training/trainer.py"], importers_in(ROOT))
    folders = {str(Path(name).parent) for name in found}
    assert {"tests/jax_moe_lora/training", "tests/jax_moe_lora/cli"} <= folders
    assert not any("pallas_kernels" in folder for folder in folders)
