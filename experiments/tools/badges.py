"""Badges that open the notebooks in Colab: ``python -m experiments.tools.badges OWNER/NAME``.

A badge is an address, and a repository has one only once it is public: whoever publishes it, or a
fork of it, runs this once. Running it again moves the badges to another address.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
# A cell of its own, so that the text of a notebook stays what it is.
CELL = "badge"


def badge_cell(repository: str, notebook: str, branch: str) -> dict[str, object]:
    """The cell before a notebook's first: a badge, and what a bare machine must do first.

    Args:
        repository: "OWNER/NAME" on GitHub.
        notebook: file name.
        branch: where the notebook lies.
    """
    address = (
        f"https://colab.research.google.com/github/{repository}/blob/{branch}/notebooks/{notebook}"
    )
    folder = repository.split("/")[1]
    lines = [
        f"[![Open in Colab]({IMAGE})]({address})\n",
        "\n",
        "On a machine without this repository, run in a cell first: "
        f"`!git clone https://github.com/{repository} && pip install -e '{folder}[lab]'`, then "
        f"`%cd {folder}/notebooks`.",
    ]
    return {"cell_type": "markdown", "id": CELL, "metadata": {}, "source": lines}


def add_badges(folder: Path, repository: str, branch: str) -> list[str]:
    """Put a badge at the head of each notebook of a folder; one that has a badge gets the new one.

    Args:
        folder: with the notebooks.
        repository: "OWNER/NAME" on GitHub.
        branch: where they lie.

    Returns:
        Names of the notebooks.

    Raises:
        ValueError: the repository is not of the form OWNER/NAME.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"expected a repository as OWNER/NAME, got {repository!r}")
    paths = sorted(folder.glob("*.ipynb"))
    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in notebook["cells"] if cell["id"] != CELL]
        notebook["cells"] = [badge_cell(repository, path.name, branch), *cells]
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    return [path.name for path in paths]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("repository", help="OWNER/NAME on GitHub")
    parser.add_argument("--branch", default="main")
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS)
    options = parser.parse_args(arguments)
    try:
        names = add_badges(options.folder, options.repository, options.branch)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{options.folder}: {', '.join(names)}\n")


if __name__ == "__main__":
    main()
