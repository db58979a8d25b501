"""Contract 15: a test's verdict depends on the product alone, so the tests read no clock and no process's memory."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "thread_time", "getrusage"}
LIMITS = {"setrlimit", "RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_CPU", "psutil", "ru_maxrss"}
MEMORY = ("VmRSS", "VmHWM", "VmSize", "/proc/self/status", "/proc/self/statm")
GENEROUS = 3600  # seconds: pyproject.toml's limit against hanging
HERE = "tests/test_verdicts.py"
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py"))


def names_in(node: ast.AST) -> set[str]:
    """Identifiers, attributes and imported names."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
        elif isinstance(part, ast.alias):
            names.add(part.name)
    return names


def short_limits(tree: ast.AST) -> Iterator[ast.Call]:
    """Calls with a constant limit: `run(..., timeout=300)`, `future.result(30)`, `mark.timeout(20)`."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        values = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
        if name in ("result", "timeout", "join", "communicate") and len(call.args) == 1:
            values += call.args
        constants = [value.value for value in values if isinstance(value, ast.Constant)]
        if any(isinstance(value, int | float) and value < GENEROUS for value in constants):
            yield call


def readings(source: str, is_test: bool) -> list[str]:
    """What in a file lets a clock, a limit or the process's memory decide.

    A script in `tests/support` that people run may print how long it took, but not assert it.
    """
    tree = ast.parse(source)
    found = [f"line {call.lineno}: a limit of its own: {ast.unparse(call)}" for call in short_limits(tree)]
    scopes = [tree] if is_test else [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    for names in map(names_in, scopes):
        found += [f"reads {name}" for name in sorted(names & (CLOCKS | LIMITS))]
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found + [f"reads {word}" for word in MEMORY if any(word in text for text in texts)]


@pytest.mark.parametrize("name", [name for name in FILES if name != HERE])
def test_contract_15_no_clock_and_no_reading_of_memory_decides(name):
    path = Path(name)
    assert readings((ROOT / path).read_text(), path.name.startswith("test_")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("began = time.perf_counter()", "reads perf_counter"),
        ("from time import monotonic", "reads monotonic"),
        ("resource.setrlimit(resource.RLIMIT_AS, (1, 1))", "reads RLIMIT_AS"),
        ("CODE = 'open(\"/proc/self/status\")'", "reads /proc/self/status"),
        ("subprocess.run(command, timeout=300)", "a limit of its own"),
        ("waiting.result(30)", "a limit of its own"),
        ("@pytest.mark.timeout(20)\ndef test(): pass", "a limit of its own"),
    ],
)
def test_a_reading_is_found(source, found):
    assert found in "\n".join(readings(source, True))


def test_what_decides_nothing_is_allowed():
    for source in ("time.sleep(0.1)", "waiting.result()", "subprocess.run(command, timeout=None)", "','.join(names)"):
        assert readings(source, True) == []
    assert readings("seconds = time.perf_counter() - began", False) == []
    assert readings("assert time.perf_counter() < 3", False) != []
