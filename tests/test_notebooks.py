"""The committed notebooks: complete, paired with their scripts, free of errors and machine paths, small and sharp."""

import re

import pytest

from support import ROOT

jupytext = pytest.importorskip("jupytext")

SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
MACHINE_PATH = re.compile(r"/(?:home|root|work|tmp|Users|mnt|workspace)/|site-packages|ipykernel_\d+")
notebooks = pytest.mark.parametrize(
    "path", [path.with_suffix(".ipynb") for path in SCRIPTS], ids=lambda path: path.stem
)


def outputs(path):
    return [output for cell in jupytext.read(path).cells for output in cell.get("outputs", [])]


def test_every_notebook_has_its_script():
    assert SCRIPTS
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {path.stem for path in SCRIPTS}


@notebooks
def test_the_notebook_has_the_cells_of_its_script(path):
    cells, script = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(half).cells]
        for half in (path, path.with_suffix(".py"))
    )
    assert cells == script


@notebooks
def test_no_cell_is_empty_and_the_first_one_is_the_title(path):
    cells = jupytext.read(path).cells
    assert all(cell.source.strip() for cell in cells)
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "To run it: `pip install" in cells[0].source


@notebooks
def test_every_code_cell_ran_once_and_in_order_without_errors_or_warnings(path):
    counts = [cell.execution_count for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(path):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


@notebooks
def test_nothing_of_the_machine_is_in_it(path):
    found = MACHINE_PATH.search(path.read_text())
    assert found is None, found


@notebooks
def test_figures_are_svg_and_the_file_is_small(path):
    figures = [output.data for output in outputs(path) if "Figure" in output.get("data", {}).get("text/plain", "")]
    assert figures
    assert all("image/svg+xml" in data and "image/png" not in data for data in figures)
    assert path.stat().st_size < 2**20


@pytest.mark.slow
@pytest.mark.xdist_group("notebooks")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs(path, tmp_path):
    pytest.importorskip("support.run_notebooks").execute(path, tmp_path)
