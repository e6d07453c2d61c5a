"""``make report``: the results of an outputs folder as one HTML page and as Markdown.

python -m experiments.report --outputs outputs --out outputs/report
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report.missing import nothing_yet
from experiments.report.page import write_html, write_markdown
from experiments.report.runs import read_results
from experiments.report.sections import make_sections


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``report.html`` and ``report.md``. Exit status 2: there is no such outputs folder."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="where the report goes; default: OUTPUTS/report")
    options = parser.parse_args(arguments)
    if not options.outputs.is_dir():
        parser.error(f"--outputs: {options.outputs} is no folder; expected the one that holds runs")
    out = options.out or options.outputs / "report"
    results = read_results(options.outputs)
    sections = make_sections(results)
    page = write_html(results, sections, out / "report.html")
    text = write_markdown(sections, out / "report.md")
    if not results.runs:
        _say(nothing_yet(results).replace("`", ""))
    for problem in results.problems:
        _say(f"{problem.status}: {problem.folder}: {problem.reason.splitlines()[0]}")
    _say(f"{len(results.runs)} finished runs: {page} and {text}")
    return 0


def _say(line: str) -> None:
    print(line)  # noqa: T201 - the command's own output


if __name__ == "__main__":
    sys.exit(main())
