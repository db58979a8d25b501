"""Writes the tables of formats into `docs/quantised.md`, accuracy and layer times: `python docs/list_formats.py`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "quantised.md"
RESULTS = Path(__file__).parents[1] / "pallas_kernels" / "results"
COMMAND = "(python docs/list_formats.py)"
ACCURACY = ("format", "bits per weight", "error of weights", "error of a layer", "KL, nats", "same token")
TIMES = ("layer", "adapters", "tokens", "16 bits, us", "format", "us", "times as fast")


def main() -> None:
    """Replaces what stands between the marks of the page."""
    PAGE.write_text(with_tables(PAGE.read_text()))


def with_tables(page: str) -> str:
    """The page with the committed figures."""
    accuracy = map(_accuracy, _rows("formats_cpu.json"))
    times = _times(_rows("h200_quantised.json"))
    return _between(_between(page, "formats", ACCURACY, accuracy), "kernels", TIMES, times)


def _rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


def _between(page: str, name: str, columns: tuple[str, ...], lines: Iterable[list[str]]) -> str:
    """The page with a table between the marks of that name."""
    begin, end = f"<!-- {name}: begin {COMMAND} -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    table = [list(columns), ["---"] * len(columns), *lines]
    return f"{before}{begin}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table) + f"\n{end}{after}"


def _accuracy(row: Mapping[str, Any]) -> list[str]:
    errors = [f"{row[name]:.1%}" for name in ("weights", "layer")]
    return [f"`{row['format']}`", f"{row['bits']:g}", *errors, f"{row['kl']:.1g}", f"{row['same']:.1%}"]


def _times(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    """Each row over quantised weights, beside the one over 16 bits of its draw."""
    whole = {(row["draw"], row["adapters"]): row["layer_us"] for row in rows if "/" not in row["engine"]}
    for row in rows:
        if "/" in row["engine"] and (row["draw"], row["adapters"]) in whole:
            own, other = row["layer_us"], whole[row["draw"], row["adapters"]]
            scheme, cell = row["engine"].partition("/")[2], (row["shape"], row["adapters"], str(row["tokens"]))
            yield [*cell, f"{other:.0f}", f"`{scheme}`", f"{own:.0f}", f"{other / own:.2f}"]


if __name__ == "__main__":
    main()
