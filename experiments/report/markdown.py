"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def to_markdown(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of headings and formatted cells."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
