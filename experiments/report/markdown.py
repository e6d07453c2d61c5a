"""Tables as Markdown, in files and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def to_markdown(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of headings and formatted cells."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def terminal() -> Console:
    """Stdout; wide where it is no terminal, such as a file."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_markdown(text: str) -> None:
    """Print text; its Markdown tables as tables that people read."""
    console = terminal()
    table: Table | None = None
    for line in [*text.splitlines(), ""]:
        if not line.startswith("|"):
            if table is not None:
                console.print(table)
                table = None
            if line:
                console.print(line, markup=False, highlight=False)
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if table is None:
            table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
            for number, cell in enumerate(cells):
                table.add_column(cell, justify="right" if number else "left", overflow="fold")
        elif not set("".join(cells)) <= set("-: |"):
            table.add_row(*cells)
