"""``make readme``: writes the tables of docs/results.md from results, so that no number is typed.

Those of a real model come from the newest runs of ``bench=likelihood`` that come with the project,
the table of the demo from the runs of ``make demo`` in ``outputs``, the way ``make report``
makes it, those of GPUs from the newest folder of ``experiments/measured`` of each device that
measured them, whatever the folder's name, or from folders that are named:

    python -m experiments.tools.readme [--sections needle,table7,ttft] [--results FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from experiments.report.device_tables import as_text, device_table, legend
from experiments.report.likelihood_table import likelihood_table
from experiments.report.likelihoods import newest_likelihood
from experiments.report.markdown import to_markdown
from experiments.report.pictures import draw_accuracy_density
from experiments.report.pictures.likelihood_curves import draw_likelihood
from experiments.report.runs import Results, Run, read_results
from experiments.report.table import Row, format_columns, reading_notes, title_of
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import ROOT
from experiments.settings.names import changed_parameters
from experiments.store import Record
from experiments.timing.result_folders import (
    COMMITTED,
    ResultFolder,
    newest_folders,
    read_folder,
)

PAGE = ROOT / "docs" / "results.md"
RESULTS = COMMITTED
SECTIONS = ("real", "needle", "table7", "ttft")
DEMO = ("flash", "meanpool", "pbs")
# At which the real model's methods are set beside one another.
REAL_DENSITY = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the sections and, with that of the demo, its pictures in ``docs``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which to write")
    parser.add_argument("--results", type=Path, nargs="+", help="folders of GPU results")
    options = parser.parse_args(arguments)
    sections = options.sections.split(",")
    for section in sections:
        if section not in SECTIONS:
            parser.error(f"unknown section {section!r}; valid: {', '.join(SECTIONS)}")
    text = PAGE.read_text()
    if "real" in sections:
        text = replace_section(text, "real", real_tables(newest_likelihood(RESULTS)))
    if "needle" in sections:
        text = replace_section(text, "needle", needle_table(ROOT / "outputs"))
    for part, make in (("table7", table7), ("ttft", ttft)):
        if part in sections:
            named = [read_folder(path) for path in options.results or ()]
            folders = named or newest_folders(RESULTS, part=part)
            text = replace_section(text, part, gpu_section(folders, make))
    PAGE.write_text(text)
    return 0


def replace_section(text: str, name: str, content: str) -> str:
    """Put content between the section's two comment lines.

    Raises:
        ValueError: the text has no such section.
    """
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    found = re.search(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no section {name!r}: expected <!-- begin {name} -->")
    return text[: found.end(1)] + content + text[found.start(2) :]


def real_tables(folder: Path) -> str:
    """Tables of a real model at one density; its picture of all densities is drawn anew in docs."""
    parts = []
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        runs = sorted(path.parent for path in group.glob("*/*/metrics.json"))
        draw_likelihood(runs, ROOT / "docs")
        parts.append(to_markdown(likelihood_table(runs, target=REAL_DENSITY)))
    environment = read_environment(runs[0])
    parts.append(
        f"{environment['device']}, bf16, texts debian-handbook and debian-policy, every knob set "
        f"to density {REAL_DENSITY:g} on held-out windows; brackets: 95 % intervals over windows "
        "(Student), differences paired by window. 32768 tokens by YaRN, untrained. All runs and "
        f"samples in {_link(folder.parent)}."
    )
    return "\n\n".join(parts) + "\n"


def _link(folder: Path) -> str:
    """To a folder of results, from a page in docs."""
    if not folder.is_relative_to(ROOT):
        return f"[{folder}]({folder})"
    source = folder.relative_to(ROOT)
    return f"[{source}](../{source})"


def read_environment(run: Path) -> Record:
    """The environment a run was made in."""
    found: Record = json.loads((run / "env.json").read_text(encoding="utf-8"))
    return found


def needle_table(outputs: Path) -> str:
    """The demo's table; its pictures are drawn anew in ``docs``.

    Only runs at default settings count, whatever else lies beside them.

    Raises:
        FileNotFoundError: the demo has not run.
    """
    runs = demo_runs(read_results(outputs))
    rows = [row for _, row in runs]
    docs = ROOT / "docs"
    columns = ["method", "density", "accuracy", "num_samples"]
    frame = pd.DataFrame(rows)[columns].assign(model="tiny", bench="needle")
    draw_accuracy_density(frame, docs / "accuracy_density.png")
    ours = next(run for run, _ in runs if run.method == "pbs")
    shutil.copy(ours.folder / "attention_map.png", docs / "attention_map.png")
    title = title_of(ours.folder.parent.parent, rows)
    device = ours.environment["device"]
    notes = [f"On {device}{_busy(rows)}.", *(f"{note}." for note in reading_notes(rows))]
    return f"{title}\n\n{to_markdown(format_columns(rows))}\n\n{' '.join(notes)}\n"


def _busy(rows: Sequence[Row]) -> str:
    """How much of the processors other processes took at most, as far as that is known."""
    loads = [row["load"] for row in rows if row.get("load") is not None]
    return f", other processes on {max(loads):.0%} of the processors" if loads else ""


def demo_runs(results: Results) -> list[tuple[Run, Row]]:
    """The runs that ``make demo`` makes, in its order, with their rows.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    runs = [
        (run, row)
        for group in results.of("needle")
        if group.model == "tiny"
        for run, row in zip(group.runs, group.rows, strict=True)
        if run.label in DEMO and run.cfg.seed == 0
        if not changed_parameters(BENCHES, run.cfg.bench)
    ]
    # Several: other weights, say. The latest counts.
    found = {pair[0].method: pair for pair in sorted(runs, key=lambda x: x[0].environment["time"])}
    missing = [name for name in DEMO if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{results.path} has no finished demo run of {', '.join(missing)}; run `make demo`"
        )
    return [found[name] for name in DEMO]


def gpu_section(folders: Sequence[ResultFolder], make: Callable[[ResultFolder], str]) -> str:
    """The tables of several devices below each other."""
    return "\n".join(make(folder) for folder in folders)


def table7(folder: ResultFolder) -> str:
    """Attention alone at the paper's densities: ours, every dense kernel, the published numbers."""
    records = folder.parts["table7"]
    lines = [as_text(device_table(records, has_published=True), legend(records))]
    packages, commit = folder.environment["packages"], folder.environment["commit"][:7]
    lines += [
        "",
        f"{folder.device}, torch {packages['torch']}, Triton {packages['triton']}, commit "
        f"{commit}, bf16, 32 query and 8 key/value heads of 128; medians, all samples in "
        f"{_link(folder.path)}.",
    ]
    return "\n".join(lines) + "\n"


def ttft(folder: ResultFolder) -> str:
    """Time to first token of Llama-3.1-8B's architecture at the paper's densities."""
    records = folder.parts["ttft"]
    return f"{as_text(device_table(records, unit='s'), legend(records))}\n\n{folder.device}.\n"


if __name__ == "__main__":
    sys.exit(main())
