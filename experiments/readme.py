"""``make readme``: writes the result tables of README.md from results, so that no number is typed.

The table of the demo comes from ``outputs/needle/tiny`` (run ``make demo`` first), that of the GPU
from the newest folder of ``experiments/results``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from experiments.config import ROOT
from experiments.published import TABLE7

README = ROOT / "README.md"
RESULTS = ROOT / "experiments" / "results"


def main() -> int:
    """Rewrite both sections and copy the demo's pictures to ``docs``."""
    text = README.read_text()
    text = replace_section(text, "needle", needle_table(ROOT / "outputs" / "needle" / "tiny"))
    folder = max(RESULTS.glob("h*_*"), key=lambda path: path.name.rpartition("_")[2])
    text = replace_section(text, "table7", table7(folder))
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


def needle_table(folder: Path) -> str:
    """The demo's table and pictures.

    Raises:
        FileNotFoundError: the demo has not run.
    """
    summary = folder / "summary.md"
    if not summary.is_file():
        raise FileNotFoundError(f"{summary} does not exist; run `make demo` first")
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    shutil.copy(folder / "accuracy_density.png", docs / "accuracy_density.png")
    newest = max(folder.glob("pbs/*/attention_map.png"), key=lambda path: path.stat().st_mtime)
    shutil.copy(newest, docs / "attention_map.png")
    environment = json.loads((newest.parent / "env.json").read_text())
    where = environment["device"]
    return f"{summary.read_text().strip()}\n\nOn {where}.\n"


def table7(folder: Path) -> str:
    """Attention alone at the paper's densities: ours, both dense kernels, the published numbers."""
    frame = pd.read_csv(folder / "table7.csv")
    environment = json.loads((folder / "results.json").read_text())["environment"]
    lines = [
        "| tokens | density | FA2, ms | cuDNN, ms | PBS per head, ms | PBS shared, ms | "
        "shared over FA2 | over cuDNN | published FA2, PBS, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    published = {row.length: row for row in TABLE7}
    for length, rows in frame.groupby("length"):
        row = rows.set_index("variant")
        times = row["median_ms"]
        shared = row.loc["pbs shared"]
        paper = published[int(length)]
        lines.append(
            f"| {length} | {shared['density']:.3f} | {times['flash']:.2f} | {times['cudnn']:.2f} | "
            f"{times['pbs']:.2f} | {times['pbs shared']:.2f} | {shared['speed_up_flash']:.2f}x | "
            f"{shared['speed_up_cudnn']:.2f}x | {paper.dense_ms}, {paper.total_ms} |"
        )
    source = folder.relative_to(ROOT)
    packages = environment["packages"]
    lines += [
        "",
        f"{environment['device']}, torch {packages['torch']}, Triton {packages['triton']}, commit "
        f"{environment['commit']}, bf16, 32 query and 8 key/value heads of 128; medians, all "
        f"samples in [{source}]({source}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
