"""Executes notebooks and writes them with their outputs: `python tests/run_notebooks.py [notebooks/NAME.py ...]`."""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
from nbformat import NotebookNode


def execute(path: Path) -> NotebookNode:
    """The notebook of a percent script after a run in an empty folder."""
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of day
    return notebook


if __name__ == "__main__":
    every = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))
    for script in map(Path, sys.argv[1:] or every):
        jupytext.write(execute(script), script.with_suffix(".ipynb"))
