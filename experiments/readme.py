"""``make readme``: writes the result tables of README.md from results, so that no number is typed.

The table of the demo comes from the runs of ``make demo`` in ``outputs``, the way ``make report``
makes it, that of the GPU from the newest folder of ``experiments/results``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from experiments.bench import BENCHES
from experiments.compare import changed_parameters
from experiments.config import ROOT
from experiments.notes import notes_of
from experiments.pictures import draw_accuracy_density
from experiments.published import TABLE7
from experiments.report.runs import Results, Run, read_results
from experiments.table import Row, format_columns, title_of, to_markdown

README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "results"
DEMO = ("flash", "meanpool", "pbs")
# Dense kernels of the GPU's tables, as far as they were there.
DENSE = {"flash": "FA2", "cudnn": "cuDNN", "fa4": "FA4"}


def main() -> int:
    """Rewrite both sections and the demo's pictures in ``docs``."""
    text = README.read_text()
    text = replace_section(text, "needle", needle_table(ROOT / "outputs"))
    folder = max(RESULTS.glob("h*_*"), key=lambda path: path.name.rpartition("_")[2])
    text = replace_section(text, "table7", table7(folder))
    text = replace_section(text, "ttft", ttft(folder))
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
    parts = [title, to_markdown(format_columns(rows)), *notes_of(rows), f"On {device}."]
    return "\n\n".join(parts) + "\n"


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


def table7(folder: Path) -> str:
    """Attention alone at the paper's densities: ours, every dense kernel, the published numbers."""
    published = {row.length: f"{row.dense_ms}, {row.total_ms}" for row in TABLE7}
    frame = pd.read_csv(folder / "table7.csv")
    environment = json.loads((folder / "results.json").read_text())["environment"]
    lines = _gpu_table(frame, "ms", 1, ("published FA2, PBS, ms", published))
    source = folder.relative_to(ROOT)
    packages = environment["packages"]
    lines += [
        "",
        f"{environment['device']}, torch {packages['torch']}, Triton {packages['triton']}, commit "
        f"{environment['commit']}, bf16, 32 query and 8 key/value heads of 128; medians, all "
        f"samples in [{source}]({source}).",
    ]
    return "\n".join(lines) + "\n"


def ttft(folder: Path) -> str:
    """Time to first token of Llama-3.1-8B's architecture at the paper's densities."""
    frame = pd.concat(pd.read_csv(path) for path in sorted(folder.glob("ttft*.csv")))
    return "\n".join(_gpu_table(frame.dropna(subset="median_ms"), "s", 1000)) + "\n"


def _gpu_table(
    frame: pd.DataFrame, unit: str, divisor: int, last: tuple[str, dict[int, str]] | None = None
) -> list[str]:
    """A row per length: times of the dense kernels and ours, and ours over each of them."""
    dense = {name: label for name, label in DENSE.items() if name in set(frame["variant"])}
    titles = ["tokens", "density"]
    titles += [f"{label}, {unit}" for label in (*dense.values(), "PBS per head", "PBS shared")]
    titles += [f"shared over {label}" for label in dense.values()]
    titles += [last[0]] if last else []
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for length, rows in frame.groupby("length"):
        row = rows.set_index("variant")
        shared = row.loc["pbs shared"]
        cells = [f"{length}", f"{shared['density']:.3f}"]
        cells += [
            f"{row['median_ms'][name] / divisor:.2f}" for name in (*dense, "pbs", "pbs shared")
        ]
        cells += [f"{shared[f'speed_up_{name}']:.2f}x" for name in dense]
        cells += [last[1][int(str(length))]] if last else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
