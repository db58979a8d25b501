"""Prints the test files that a change may break: `make t` runs the quick tests among them.

A change is what differs from the merge base with the default branch: commits, uncommitted edits and untracked files. A
source file selects the tests of the folder that mirrors its own, and those of each folder with a module that imports
it. A file of `tests/support` selects the tests that import it; a test, itself; what configures the tests, all of them.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGES = ("jax_moe_lora", "pallas_kernels")
EVERYTHING = ("Makefile", "pyproject.toml", "constraints.txt", "tests/conftest.py")
Importers = Callable[[str], Iterable[str]]  # a module -> the modules that import it


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def merge_base(root: Path) -> str:
    """The commit at which this branch left the default one; HEAD where there is no default branch."""
    for branch in ("origin/HEAD", "origin/main", "main", "HEAD"):
        found = subprocess.run(["git", "merge-base", "HEAD", branch], cwd=root, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    raise SystemExit(f"{root} is not a git repository with a commit.")


def changed_files(root: Path) -> set[str]:
    """Paths below `root`: changed, added or removed since the merge base, committed or not."""
    tracked = git(root, "diff", "--name-only", "--no-renames", merge_base(root))
    untracked = git(root, "ls-files", "--others", "--exclude-standard")
    return {*tracked.splitlines(), *untracked.splitlines()}


def module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tests_of_folder(root: Path, folder: Path) -> set[str]:
    """The test files of the folder that mirrors a source folder, or of the nearest one above that has any."""
    while folder != Path():
        if found := {str(path.relative_to(root)) for path in (root / "tests" / folder).glob("test_*.py")}:
            return found
        folder = folder.parent
    return set()


def imported_support(source: str) -> set[str]:
    """Names of the modules of `tests/support` that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("support.")}


def tests_of_support(root: Path, changed: set[str]) -> set[str]:
    """The test files that import a module of `tests/support`, directly or through another one."""
    files = {path: imported_support(path.read_text()) for path in (root / "tests").rglob("*.py")}
    grown = True
    while grown:
        using = {path.stem for path, names in files.items() if path.parent.name == "support" and names & changed}
        grown = not using <= changed
        changed = changed | using
    return {str(path.relative_to(root)) for path, names in files.items() if is_test(path) and names & changed}


def is_test(path: Path) -> bool:
    return path.name.startswith("test_") and path.suffix == ".py"


def affected(root: Path, changed: Iterable[str], importers: Importers) -> set[str]:
    """The test files to run, as paths below `root`."""
    found: set[str] = set()
    support: set[str] = set()
    for name in changed:
        path = Path(name)
        if name in EVERYTHING or path.name == "conftest.py":
            return {str(test.relative_to(root)) for test in (root / "tests").rglob("test_*.py")}
        if path.parts[0] in PACKAGES:
            modules = {module_of(name), *importers(module_of(name))} if path.suffix == ".py" else set()
            folders = {path.parent, *(folder_of(root, module) for module in modules)}
            found |= {test for folder in folders for test in tests_of_folder(root, folder)}
        elif path.parts[:2] == ("tests", "support"):
            support.add(path.stem)
        elif is_test(path) and (root / path).exists():
            found.add(name)
        else:  # the README, a notebook, a page of the documentation
            found |= {str(test.relative_to(root)) for test in (root / "tests").glob("test_*.py")}
    return found | tests_of_support(root, support)


def folder_of(root: Path, module: str) -> Path:
    path = Path(*module.split("."))
    return path if (root / path).is_dir() else path.parent


def importers_in(root: Path) -> Importers:
    """From the tree's import graph; a module that is not there any more has no importers."""
    import grimp

    sys.path.insert(0, str(root))
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return lambda module: graph.find_modules_that_directly_import(module) if module in graph.modules else ()


def main() -> None:
    root = Path(__file__).parents[2]
    changed = changed_files(root)
    print(*sorted(affected(root, changed, importers_in(root))))


if __name__ == "__main__":
    main()
