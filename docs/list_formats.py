"""Writes the table of formats' accuracy into `docs/quantised.md`: `python docs/list_formats.py`."""

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "quantised.md"
RESULT = Path(__file__).parents[1] / "pallas_kernels" / "results" / "formats_cpu.json"
BEGIN, END = "<!-- formats: begin (python docs/list_formats.py) -->", "<!-- formats: end -->"
COLUMNS = ("format", "bits per weight", "error of weights", "error of a layer", "KL, nats", "same token")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def main() -> None:
    """Replaces what stands between the two marks of the page."""
    PAGE.write_text(with_table(PAGE.read_text()))


def with_table(page: str) -> str:
    """The page with the committed figures."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = json.loads(RESULT.read_text())["rows"]
    return f"{before}{BEGIN}\n\n{HEAD}{''.join(map(line, rows))}\n{END}{after}"


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    errors = [f"{row[name]:.1%}" for name in ("weights", "layer")]
    cells = [f"`{row['format']}`", f"{row['bits']:g}", *errors, f"{row['kl']:.1g}", f"{row['same']:.1%}"]
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
