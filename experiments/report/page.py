"""A report as one HTML file that needs nothing else, and as Markdown with pictures beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from experiments.files import write_atomically
from experiments.report.markdown import to_markdown
from experiments.report.pictures.looks import LOOKS, look_of, save
from experiments.report.runs import Results
from experiments.report.sections import Block, Details, Photo, Picture, Section, Table, Text

# Attention maps are large and have few colours: a palette and this width are enough to see them.
PHOTO_COLOURS = 96
PHOTO_WIDTH = 1100
TITLE = "Sparse prefill attention: results"


def write_html(results: Results, sections: Sequence[Section], path: Path) -> Path:
    """The page. It holds no script and may load nothing, which its own policy enforces."""
    environment = Environment(
        loader=PackageLoader("experiments.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": mark_code, "cell": mark_cell}
    environment.globals |= {
        "rows_of": rows_of,
        "is_word": is_word,
        "source_of": source_of,
        "kind_of": kind_of,
    }
    page = environment.get_template("page.html.jinja").render(
        title=TITLE,
        made=_now(),
        num_runs=len(results.runs),
        num_groups=len(results.groups),
        num_problems=len(results.problems),
        sections=sections,
    )
    write_atomically(path, page + "\n")
    return path


def write_markdown(sections: Sequence[Section], path: Path) -> Path:
    """The brief sections, for a README; pictures go to the folder ``pictures`` beside it."""
    parts = [f"# {TITLE}", f"Made {_now()}."]
    for section in sections:
        if section.is_brief:
            parts.append(f"## {section.title}")
            parts += [
                _block_as_markdown(block, path.parent / "pictures") for block in section.blocks
            ]
    write_atomically(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def kind_of(block: Block) -> str:
    """What the template asks a block."""
    return type(block).__name__.lower()


def rows_of(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headings and cells as text; a named index becomes the first columns."""
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    headings = [" ".join(c) if isinstance(c, tuple) else str(c) for c in frame.columns]
    rows = [[_text(value) for value in row] for row in frame.itertuples(index=False)]
    return headings, rows


def is_word(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column holds words, which stand on the left, and not numbers."""
    cells = [row[column] for row in rows if row[column]]
    num_words = sum(cell[0].isalpha() or cell[0] == "`" for cell in cells)
    return 2 * num_words > len(cells)


def source_of(block: Picture | Photo) -> str:
    """A picture as the text of an image's source."""
    if isinstance(block, Picture):
        return f"data:image/svg+xml;base64,{base64.b64encode(as_svg(block.figure)).decode()}"
    return f"data:image/png;base64,{base64.b64encode(shrink(block.png)).decode()}"


def as_svg(figure: Figure) -> bytes:
    """A picture as SVG, letters as shapes, so that it looks the same without its font."""
    buffer = io.BytesIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "pbs"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def shrink(png: bytes) -> bytes:
    """A picture in fewer colours, and no wider than the page."""
    with Image.open(io.BytesIO(png)) as image:
        image = image.convert("RGB")
        if image.width > PHOTO_WIDTH:
            height = round(image.height * PHOTO_WIDTH / image.width)
            image = image.resize((PHOTO_WIDTH, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.quantize(PHOTO_COLOURS).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def mark_code(text: str) -> Markup:
    """Escaped text with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def mark_cell(text: str, heading: str) -> Markup:
    """A cell; methods get the mark that they have in the pictures."""
    name = text.removeprefix("dense ").partition(" ")[0]
    is_method = heading in ("method", "variant", "best") and name in LOOKS
    if not is_method:
        return mark_code(text)
    mark = Markup('<i class="mark" style="background:{}"></i>').format(look_of(name).colour)
    return Markup('<span class="name">{}{}</span>').format(mark, text)


def _block_as_markdown(block: Block, pictures: Path) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Table):
        headings, rows = rows_of(block.frame)
        if not rows:
            return ""
        columns = {name: [row[i] for row in rows] for i, name in enumerate(headings)}
        return "\n\n".join(part for part in (block.caption, to_markdown(columns)) if part)
    if isinstance(block, Details):
        return ""
    path = pictures / f"{block.name}.png"
    if isinstance(block, Picture):
        save(block.figure, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(block.png)
    return f"![{block.alt}](pictures/{path.name})"


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
