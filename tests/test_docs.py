"""The documentation builds, its links lead somewhere, and what is drawn or listed in it is current."""

import json
import re
import runpy
import tomllib
from importlib import import_module

import pytest
import yaml

from support import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "pallas_kernels").rglob("*.md"))]
RESULTS = ROOT / "pallas_kernels" / "results"
PUBLIC = (
    "jax_moe_lora",
    *(f"jax_moe_lora.{name}" for name in ("export", "inspect", "nn", "parity", "plots", "training")),
)
PATHS = ("docs/", "jax_moe_lora/", "notebooks/", "pallas_kernels/", "tests/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_or_links_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(rf"`((?:{'|'.join(PATHS)})[\w./-]*)`", text)
    assert not missing + [name for name in named if page.name != "CHANGELOG.md" and not (ROOT / name).exists()]


def test_the_steps_of_a_page_name_functions_of_their_files():
    rows = [
        line.split("|")[2:4]
        for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()
        if re.match(r"\| \d+\. ", line)
    ]
    missing = []
    for files, functions in rows:
        source = "\n".join((ROOT / file).read_text() for file in re.findall(r"`([^`]+)`", files))
        parts = [part for name in re.findall(r"`([^`]+)`", functions) for part in name.split(".")]
        missing += [part for part in parts if not re.search(rf"^ *(def|class) {part}\b", source, re.MULTILINE)]
    assert rows
    assert not missing


def test_the_picture_of_imports_is_current():
    page = (DOCS / "contributing.md").read_text()
    drawn = runpy.run_path(str(DOCS / "draw_imports.py"))["with_picture"](page)
    assert drawn == page, "run python docs/draw_imports.py"


def test_the_table_of_families_is_current():
    page = (DOCS / "families.md").read_text()
    assert runpy.run_path(str(DOCS / "list_families.py"))["with_table"](page) == page, (
        "run python docs/list_families.py"
    )


@pytest.mark.slow(5)
def test_the_tables_of_predictions_are_current():
    page = (DOCS / "scaling.md").read_text()
    assert runpy.run_path(str(DOCS / "list_scaling.py"))["with_tables"](page) == page, "run python docs/list_scaling.py"


def test_the_table_of_formats_is_current():
    page = (DOCS / "quantised.md").read_text()
    assert runpy.run_path(str(DOCS / "list_formats.py"))["with_tables"](page) == page, "run python docs/list_formats.py"


def test_every_room_is_in_the_map_of_the_code():
    rooms = {room.split(".")[1] for room in runpy.run_path(str(DOCS / "draw_imports.py"))["room_imports"]()}
    tables = (DOCS / "contributing.md").read_text().partition("### jax_moe_lora")[2]
    described = {
        name
        for line in tables.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert described == rooms, "describe each room in docs/contributing.md"


def test_the_figure_shows_the_committed_results():
    draw = runpy.run_path(str(DOCS / "draw_figures.py"))
    shown = draw["digest"](draw["load"]("h200_peers.json"), draw["load"]("h200.json"))
    assert shown in draw["FIGURE"].read_text(), "run python docs/draw_figures.py"


def test_the_figure_is_drawn(tmp_path):
    figure = tmp_path / "figure.svg"
    runpy.run_path(str(DOCS / "draw_figures.py"))["main"](figure)
    assert figure.read_text().rstrip().endswith("</svg>")


def test_each_result_is_listed_with_its_device_and_date():
    lines = (RESULTS / "README.md").read_text().splitlines()
    cells = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:4]]
        for line in lines
        if line.startswith("| `")
    }
    results = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    assert cells == {name: [result["device"], result["date"]] for name, result in results.items()}


@pytest.mark.parametrize("module", [*PUBLIC, "jax_moe_lora.errors", "pallas_kernels.ops"])
def test_every_public_name_is_in_the_reference(module):
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    listed = {entry.rpartition(".")[2] for entry in re.findall(r"^::: (\S+)", pages, re.MULTILINE)}
    found = import_module(module)
    names = getattr(found, "__all__", None) or [name for name in vars(found) if name.endswith("Error")]
    assert not sorted(set(names) - listed), "list them in docs/reference/"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert {"message", "title", "authors"} <= set(citation)
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
