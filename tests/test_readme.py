"""The README's Python runs as it stands, and prints what it says."""

import re

import jax
import pytest

from support import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


# Training, and many adapters behind few slots, take their time.
CASES = [
    pytest.param(code, marks=pytest.mark.slow if "pathlib" in code or "Trainer" in code else ()) for code in SNIPPETS
]


@pytest.mark.parametrize("code", CASES, ids=[code.splitlines()[0] for code in SNIPPETS])
def test_a_snippet_runs_and_prints_what_its_comment_says(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with jax.numpy_dtype_promotion("standard"):  # as a user runs it: jax's own attention promotes bfloat16
        exec(code, {})
    printed = [line.rpartition("#")[2].strip() for line in code.splitlines() if line.startswith("print(")]
    assert capsys.readouterr().out.splitlines() == printed
