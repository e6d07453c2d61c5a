"""``make readme``: writes the result tables of README.md from results, so that no number is typed.

The table of the demo comes from the runs of ``make demo`` in ``outputs``, the way ``make report``
makes it, those of GPUs from the newest folder of ``experiments/measured`` of each device that
measured them, whatever the folder's name, or from folders that are named:

    python -m experiments.tools.readme [--sections needle,table7,ttft] [--results FOLDER ...]
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from experiments.report.markdown import to_markdown
from experiments.report.pictures import draw_accuracy_density
from experiments.report.runs import Results, Run, read_results
from experiments.report.table import Row, format_columns, reading_notes, title_of
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import ROOT
from experiments.settings.names import changed_parameters
from experiments.store import Record
from experiments.timing.published import TABLE7, density_at
from experiments.timing.result_folders import ResultFolder, newest_folders, read_folder
from experiments.timing.samples import FEW_SAMPLES
from experiments.timing.timing_report import shape_of

README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "measured"
SECTIONS = ("needle", "table7", "ttft")
# Behind a density that the paper does not state.
UNSTATED = "*"
DEMO = ("flash", "meanpool", "pbs")
# Dense kernels of the GPU's tables, as far as they were there.
DENSE = {"flash": "FA2", "cudnn": "cuDNN", "fa4": "FA4"}


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
    text = README.read_text()
    if "needle" in sections:
        text = replace_section(text, "needle", needle_table(ROOT / "outputs"))
    for part, make in (("table7", table7), ("ttft", ttft)):
        if part in sections:
            named = [read_folder(path) for path in options.results or ()]
            folders = named or newest_folders(RESULTS, part=part)
            text = replace_section(text, part, gpu_section(folders, make))
    README.write_text(text)
    return 0


def replace_section(text: str, name: str, content: str) -> str:
    """Put content between the section's two comment lines.

    Raises:
        ValueError: the text has no such section.
    """
    pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
    found = re.search(pattern, text, re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no section {name!r}: expected <!-- begin {name} -->")
    return text[: found.end(1)] + content + text[found.start(2) :]


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
    published = {row.length: f"{row.dense_ms}, {row.total_ms}" for row in TABLE7}
    lines = _gpu_table(folder.parts["table7"], "ms", 1, ("published FA2, PBS, ms", published))
    source = folder.path.relative_to(ROOT) if folder.path.is_relative_to(ROOT) else folder.path
    packages, commit = folder.environment["packages"], folder.environment["commit"][:7]
    lines += [
        "",
        f"{folder.device}, torch {packages['torch']}, Triton {packages['triton']}, commit "
        f"{commit}, bf16, 32 query and 8 key/value heads of 128; medians, all samples in "
        f"[{source}]({source}).",
    ]
    return "\n".join(lines) + "\n"


def ttft(folder: ResultFolder) -> str:
    """Time to first token of Llama-3.1-8B's architecture at the paper's densities."""
    return "\n".join([*_gpu_table(folder.parts["ttft"], "s", 1000), "", f"{folder.device}.\n"])


def _gpu_table(
    records: Sequence[Record],
    unit: str,
    divisor: int,
    last: tuple[str, dict[int, str]] | None = None,
) -> list[str]:
    """A row per length: times of the dense kernels and ours, and ours over each of them.

    Then what must be said of it: what brackets are, what marks mean.
    """
    measured = sorted((one for one in records if _has_times(one)), key=lambda one: one["length"])
    kernels = {name for record in measured for name in record["dense"]}
    dense = {name: label for name, label in DENSE.items() if name in kernels}
    titles = ["tokens", "density", "samples", "spread, %"]
    titles += [f"{label}, {unit}" for label in (*dense.values(), "PBS per head", "PBS shared")]
    titles += [f"shared over {label}" for label in dense.values()]
    titles += [last[0]] if last else []
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for record in measured:
        cells = _gpu_cells(record, list(dense), divisor)
        cells += [last[1][record["length"]]] if last else []
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _legend(measured)]


def _has_times(record: Record) -> bool:
    return any(entry["median_ms"] is not None for entry in record["methods"].values())


def _gpu_cells(record: Record, dense: Sequence[str], divisor: int) -> list[str]:
    """One length."""
    empty: Record = {"median_ms": None, "failure": "not measured"}
    entries = {name: record["dense"].get(name, empty) for name in dense}
    entries |= {name: record["methods"].get(name, empty) for name in ("pbs", "pbs shared")}
    timed = [entry for entry in entries.values() if entry["median_ms"] is not None]
    counts = sorted({entry["num_samples"] for entry in timed})
    spread = [
        100 * (entry["p80_ms"] - entry["p20_ms"]) / entry["median_ms"]
        for entry in timed
        if entry["num_samples"] > 1 and entry["p20_ms"] is not None
    ]
    shared, waits = entries["pbs shared"], shape_of(record) is not None
    is_few = counts[0] < FEW_SAMPLES
    is_cold = any(entry.get("is_warm") is False for entry in timed)
    marks = f"{' (few)' if is_few else ''}{' (never warm)' if is_cold else ''}"
    is_stated = record.get("is_published_density", density_at(record["length"])[1])
    return [
        f"{record['length']}",
        f"{record['target_density']:.3f}{'' if is_stated else UNSTATED}",
        f"{' to '.join(str(counts[end]) for end in ((0, -1) if len(counts) > 1 else (0,)))}{marks}",
        f"{max(spread):.1f}" if len(spread) == len(timed) else "unknown",
        *(_time_text(entry, divisor, waits) for entry in entries.values()),
        *(_ratio_text(shared, name, waits) for name in dense),
    ]


def _time_text(entry: Record, divisor: int, has_wait: bool) -> str:
    """The device's time, and in brackets what a caller waits, where that was measured."""
    if entry["median_ms"] is None:
        return str(entry["failure"])
    wait = entry.get("wall_ms") if has_wait else None
    waits = "" if wait is None else f" ({wait / divisor:.2f})"
    return f"{entry['median_ms'] / divisor:.2f}{waits}"


def _ratio_text(entry: Record, name: str, has_wait: bool) -> str:
    """The ratio of the device's times, and in brackets that of what a caller waits."""
    ratio = entry.get("speed_up", {}).get(name)
    wait = entry.get("wall_speed_up", {}).get(name) if has_wait else None
    return ("" if ratio is None else f"{ratio:.2f}x") + ("" if wait is None else f" ({wait:.2f}x)")


def _legend(records: Sequence[Record]) -> str:
    """What the columns mean, as far as they are there."""
    entries = [e for r in records for e in (*r["dense"].values(), *r["methods"].values())]
    waits = any(entry.get("wall_ms") is not None for entry in entries)
    parts = [
        "Samples: calls behind each number; fewer than "
        f"{FEW_SAMPLES} are marked as few. Spread: the largest distance between 20th and 80th "
        "percentile of a row's times, in % of the median."
    ]
    if shape_of(records[0]) is None:
        parts.append("Times end when the first token is read.")
    elif waits:
        parts.append(
            "Times are the device's own; in brackets what a caller waits for one synchronised call."
        )
    else:
        parts.append("Times are the device's own; what a caller waits was not measured.")
    if any(not r.get("is_published_density", density_at(r["length"])[1]) for r in records):
        parts.append(f"{UNSTATED} The paper states no density here; that of 131072 tokens is used.")
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
