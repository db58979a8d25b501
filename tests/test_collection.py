"""Collecting the tests costs no import of torch and what stands on it: the tests that use them import them."""

import ast

import pytest

from support import ROOT

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "nbclient",
    "support.run_notebooks",
    "jax_moe_lora.demo.saving",
    "jax_moe_lora.demo.train",
}
FILES = sorted((ROOT / "tests").rglob("test_*.py"))


def imported_at_once(source: str) -> set[str]:
    """Modules that a file imports, or asks pytest for, outside of its functions."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef):
            calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
            asked = [call.args for call in calls if getattr(call.func, "attr", "") == "importorskip"]
            names |= {str(arguments[0].value) for arguments in asked if isinstance(arguments[0], ast.Constant)}
    return names | {name.partition(".")[0] for name in names}


def test_no_test_file_imports_torch_when_it_is_collected():
    found = {str(path.relative_to(ROOT)): imported_at_once(path.read_text()) & HEAVY for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source", ["import torch.nn", "from transformers import AutoConfig", "torch = pytest.importorskip('torch')"]
)
def test_such_an_import_is_found(source):
    assert imported_at_once(source) & HEAVY
    assert not imported_at_once(f"def test():\n    {source}") & HEAVY
