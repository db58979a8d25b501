"""Writes the picture of imports into `docs/contributing.md`: `python docs/draw_imports.py`.

The graph is what grimp reads from the source. An arrow that follows from two others is left out.
"""

from pathlib import Path

import grimp

PAGE = Path(__file__).parent / "contributing.md"
PACKAGES = ("jax_moe_lora", "pallas_kernels")
BEGIN, END = "<!-- imports: begin (python docs/draw_imports.py) -->", "<!-- imports: end -->"


def main() -> None:
    """Replaces what stands between the two marks of the page."""
    PAGE.write_text(with_picture(PAGE.read_text()))


def with_picture(page: str) -> str:
    """The page with the picture of the present imports."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{mermaid()}{END}{after}"


def mermaid() -> str:
    """Both packages as one mermaid flowchart, a box for each room."""
    imports = room_imports()
    lines = ["```mermaid", "flowchart TD"]
    for package in PACKAGES:
        lines.append(f"  subgraph {package}")
        lines += [
            f"    {box(room)}[{room.partition('.')[2]}]" for room in sorted(imports) if room.startswith(f"{package}.")
        ]
        lines.append("  end")
    lines += [f"  {box(importer)} --> {box(room)}" for importer, room in sorted(reduced(imports))]
    return "\n".join([*lines, "```", ""])


def box(room: str) -> str:
    """An identifier that mermaid has no other use for."""
    return room.replace(".", "_")


def room_imports() -> dict[str, set[str]]:
    """What each room, a folder or a file at the top of a package, imports from other rooms."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports: dict[str, set[str]] = {room: set() for package in PACKAGES for room in graph.find_children(package)}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, target = room_of(module), room_of(imported)
            if importer in imports and target in imports and importer != target:
                imports[importer].add(target)
    return imports


def room_of(module: str) -> str:
    """`jax_moe_lora.models.decoder` stands in `jax_moe_lora.models`."""
    return ".".join(module.split(".")[:2])


def reduced(imports: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows without those that a longer way says already."""
    below = {room: reachable(room, imports) for room in imports}
    return [
        (importer, room)
        for importer, rooms in imports.items()
        for room in rooms
        if not any(room in below[other] for other in rooms if other != room)
    ]


def reachable(room: str, imports: dict[str, set[str]]) -> set[str]:
    """All rooms that a room imports, directly or by others."""
    seen: set[str] = set()
    waiting = [room]
    while waiting:
        new = imports[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


if __name__ == "__main__":
    main()
