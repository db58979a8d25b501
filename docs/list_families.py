"""Writes the table of families into `docs/families.md`: `python docs/list_families.py`."""

from pathlib import Path

from jax_moe_lora.models.families.summary import FamilySummary, summaries

PAGE = Path(__file__).parent / "families.md"
BEGIN, END = "<!-- families: begin (python docs/list_families.py) -->", "<!-- families: end -->"
HEAD = (
    "| `model_type` | attention | router | beside them | adapters may target | refused |\n|---|---|---|---|---|---|\n"
)


def main() -> None:
    """Replaces what stands between the two marks of the page."""
    PAGE.write_text(with_table(PAGE.read_text()))


def with_table(page: str) -> str:
    """The page with the present families."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{HEAD}{''.join(map(row, summaries()))}\n{END}{after}"


def row(one: FamilySummary) -> str:
    """One line of the table."""
    names = ", ".join(f"`{name}`" for name in (one.model_type, *one.wrappers))
    targets = ", ".join(f"`{target}`" for target in one.targets)
    cells = (names, "; ".join(one.attention), one.router, ", ".join(one.others), targets, one.refuses)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
