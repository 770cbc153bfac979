"""Plain text tables for a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = (), cut: bool = True
) -> str:
    """Aligned columns; those titled in ``right`` are flush right, and ``cut`` fits the last to the terminal."""
    lines = [list(titles), *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    room = max(20, shutil.get_terminal_size((160, 24)).columns - sum(widths[:-1]) - 2 * (len(titles) - 1))
    widths[-1] = min(widths[-1], room)
    text = []
    for line in lines:
        cells = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for title, cell, width in zip(titles, line, widths, strict=True)
        ]
        if titles[-1] not in right:
            cells[-1] = shorten(line[-1], room) if cut else line[-1]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def shorten(text: str, width: int) -> str:
    """One line of at most ``width`` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3].rstrip() + "..."


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"
