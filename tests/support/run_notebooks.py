"""Executes notebooks and writes them with their outputs.

`PYTHONPATH=. python tests/support/run_notebooks.py [notebooks/NAME.py ...]`; without a name, all of them.
"""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
from nbformat import NotebookNode


def execute(path: Path, folder: str | Path) -> NotebookNode:
    """Runs a percent script in a folder.

    Args:
      path: the script.
      folder: the working directory of the kernel.

    Returns:
      The notebook with its outputs. Running it again changes no cell id and no time of day.
    """
    notebook = jupytext.read(path)
    options = {"timeout": None, "coalesce_streams": True, "resources": {"metadata": {"path": str(folder)}}}
    nbclient.NotebookClient(notebook, **options).execute()
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)  # the times of day
    return notebook


if __name__ == "__main__":
    every = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))
    for script in map(Path, sys.argv[1:] or every):
        with tempfile.TemporaryDirectory() as empty:
            jupytext.write(execute(script, empty), script.with_suffix(".ipynb"))
