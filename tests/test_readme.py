"""The Python of the README and of the documentation runs as it stands, in any folder, and prints what it says."""

import os
import re
import subprocess
import sys

import jax
import pytest

from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The quickstart repeats the README's lines; what is written twice runs once.
SNIPPETS = {
    code: page.stem for page in reversed(PAGES) for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
}
TAKE_THEIR_TIME = ("register_adapter", "Trainer")  # many adapters behind few slots, and training
CASES = [
    pytest.param(code, id=page, marks=pytest.mark.slow if any(word in code for word in TAKE_THEIR_TIME) else ())
    for code, page in SNIPPETS.items()
]


def test_the_readme_is_short_and_has_its_five_lines():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("code", CASES)
def test_a_snippet_runs_in_any_folder_and_prints_what_its_comment_says(code, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if "mesh=" in code:  # trees of a bank's form say how it is split, which the tests' checks of shapes do not accept
        path = {"PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, env=os.environ | path)
        out = run.stdout.decode()
    else:
        with jax.numpy_dtype_promotion("standard"):  # as a user runs it: jax's own attention promotes bfloat16
            exec(code, {})
        out = capsys.readouterr().out
    printed = [line.rpartition("#")[2].strip() for line in code.splitlines() if line.startswith("print(")]
    assert out.splitlines() == printed
    assert not list(tmp_path.iterdir())
