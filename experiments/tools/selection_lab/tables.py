"""The tables of docs/findings.md, and README.md's, from results of the lab that come along.

python -m experiments.tools.selection_lab.tables     # rewrites them
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pandas as pd

from experiments.report.markdown import to_markdown
from experiments.settings.config import ROOT
from experiments.statistics import compare_paired_values, student_interval
from experiments.timing.cost_model import Shape, Work, dense_flops, method_cost
from experiments.tools.readme import RESULTS, replace_section
from experiments.tools.selection_lab.variants import VARIANTS

FINDINGS = ROOT / "docs" / "findings.md"
README = ROOT / "README.md"
FOLDER = RESULTS / "selection_2026-11-27"
SKIPPING = RESULTS / "skipping_2026-11-28" / "skipping_8192.csv"
# The lab's form of the method.
OURS = "base"
# The density that targets and ablations are stated at, and the distance that costs are.
TARGET = 0.2
TARGET_KL = 0.05
SHAPE = Shape(32, 8, 128)
LENGTHS = (8192, 32768, 131072)
COSTED = ("pbs_calibrated", "pbs", "xattention", "minference")
METHODS = {
    OURS: "`pbs_calibrated`",
    "keys not moved": "the same, keys not moved",
    "every 8th query sampled": "`pbs_calibrated`, every 8th query sampled",
    "pbs": "`pbs`",
    "pbs_plus": "`pbs_plus`",
    "meanpool": "`meanpool`",
    "xattention": "`xattention`",
    "minference": "`minference`",
    "prism": "`prism`",
    "flexprefill": "`flexprefill`",
    "random_blocks": "`random_blocks`",
}
HEADLINE = (OURS, "keys not moved", "pbs", "meanpool", "xattention", "minference", "flexprefill")


def sections(folder: Path = FOLDER) -> dict[str, str]:
    """Markdown by section."""
    short = pd.read_csv(folder / "densities_8192.csv")
    variants = pd.read_csv(folder / "variants_8192.csv")
    long = pd.read_csv(folder / "all_32768.csv")
    return {
        "densities_8192": by_density(short),
        "methods_8192": beside(short[short.target == TARGET], METHODS),
        "equal_kl_8192": at_equal_kl(short),
        "tails_8192": tails(short[short.target == TARGET]),
        "variants_8192": of_variants(variants),
        "densities_32768": by_density(long),
        "methods_32768": beside(long[long.target == TARGET], METHODS),
        "variants_32768": of_variants(long[long.target == TARGET]),
        "cost": cost(),
        "skipping": skipping(pd.read_csv(SKIPPING)),
    }


def headline(folder: Path = FOLDER) -> dict[str, str]:
    """README.md's table: KL at equal density, nearest to dense first."""
    columns: dict[str, list[str]] = {}
    found = {}
    for file in ("densities_8192", "all_32768"):
        rows = pd.read_csv(folder / f"{file}.csv")
        found[file] = rows[rows.target == TARGET]
    mean = found["densities_8192"].groupby("variant").kl.mean()
    for name in sorted(set(mean.index) & set(HEADLINE), key=lambda name: mean[name]):
        columns.setdefault("density 0.2", []).append(METHODS[name])
        for file, head in (("densities_8192", "KL, 8192 tokens"), ("all_32768", "KL, 32768")):
            kl = list(_by_window(found[file], name).values())
            cell = "not measured"
            if kl:
                interval = student_interval(kl)
                middle = sum(kl) / len(kl)
                cell = f"{middle:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
            columns.setdefault(head, []).append(cell)
    return {"headline": to_markdown(columns) + "\n"}


def cost() -> str:
    """Order and selection by the cost model, 32/8 heads of 128: operations and bytes."""
    columns: dict[str, list[str]] = {}
    for num_tokens in LENGTHS:
        dense = dense_flops(SHAPE, num_tokens)
        for method in COSTED:
            stages = method_cost(method, SHAPE, num_tokens, density=TARGET)
            cells = {"tokens": str(num_tokens), "method": f"`{method}`"}
            for name in ("order", "selection"):
                work = stages.get(name, Work())
                cells[f"{name}, % of dense operations"] = f"{100 * work.flops / dense:.2f}"
                cells[f"{name}, MiB"] = f"{work.num_bytes / 2**20:.0f}"
            for column, cell in cells.items():
                columns.setdefault(column, []).append(cell)
    return to_markdown(columns) + "\n"


def by_density(rows: pd.DataFrame) -> str:
    """KL of each method at each density."""
    mean = rows.groupby(["variant", "target"]).kl.mean()
    columns: dict[str, list[str]] = {"method": [], **{str(x): [] for x in sorted(set(rows.target))}}
    for name, label in METHODS.items():
        if name not in mean.index:
            continue
        columns["method"].append(label)
        for target in sorted(set(rows.target)):
            at = (name, target)
            columns[str(target)].append(f"{mean[at]:.4f}" if at in mean.index else "")
    return to_markdown(columns) + "\n"


def beside(rows: pd.DataFrame, labels: dict[str, str]) -> str:
    """Density, KL with its interval, differences paired by window, and quarters."""
    ours = _by_window(rows, OURS)
    columns: dict[str, list[str]] = {}

    def add(**cells: str) -> None:
        for name, cell in cells.items():
            columns.setdefault(name.replace("_", " "), []).append(cell)

    for name, label in labels.items():
        some = rows[rows.variant == name]
        if some.empty:
            continue
        kl = _by_window(rows, name)
        interval = student_interval(list(kl.values()))
        add(
            method=label,
            density=f"{some.density.mean():.3f}",
            KL=f"{some.kl.mean():.4f} [{interval.low:.4f}, {interval.high:.4f}]",
            less_that_of_pbs_calibrated=_difference(kl, ours) if name != OURS else "",
            NLL_difference=f"{some.nll_difference.mean():+.4f}",
            **_quarters(some, "kl", "{:.4f}"),
        )
    return to_markdown(columns) + "\n"


def at_equal_kl(rows: pd.DataFrame, kl: float = TARGET_KL) -> str:
    """The density that each method needs to be this near to dense, window by window."""
    columns: dict[str, list[str]] = {"method": [], "density": [], "tiles over ours": []}
    ours = densities_at(rows[rows.variant == OURS], kl)
    least = {}
    for name in METHODS:
        found = densities_at(rows[rows.variant == name], kl)
        if found:
            least[name] = sum(found.values()) / len(found)
    for name in sorted(least, key=least.__getitem__):
        found = densities_at(rows[rows.variant == name], kl)
        num_windows = rows[rows.variant == name].window.nunique()
        if len(found) < num_windows:
            columns["method"].append(METHODS[name])
            columns["density"].append(f"reached in {len(found)} of {num_windows} windows")
            columns["tiles over ours"].append("")
            continue
        interval = student_interval(list(found.values()))
        ratios = [found[window] / ours[window] for window in found]
        between = student_interval(ratios)
        columns["method"].append(METHODS[name])
        columns["density"].append(f"{least[name]:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
        columns["tiles over ours"].append(
            ""
            if name == OURS
            else f"{sum(ratios) / len(ratios):.2f}x [{between.low:.2f}, {between.high:.2f}]"
        )
    return to_markdown(columns) + "\n"


def skipping(rows: pd.DataFrame) -> str:
    """Selected tiles that a kernel could skip, over both texts, and what rows would lose."""
    columns: dict[str, list[str]] = {}
    for (method, order, factor), some in rows.groupby(["method", "order", "factor"], sort=False):
        cells = {
            "method": f"`{method}`",
            "tiles come": "in plan order" if order == "plan" else order,
            "factor": f"{factor:g}",
            "skipped, % of selected tiles": f"{100 * some.skipped.sum() / some.selected.sum():.1f}",
            "attention lost, % (mean)": f"{100 * some.lost_mean.mean():.2g}",
            "by the worst row": f"{100 * some.lost_worst.max():.2g}",
        }
        for column, cell in cells.items():
            columns.setdefault(column, []).append(cell)
    return to_markdown(columns) + "\n"


def densities_at(rows: pd.DataFrame, kl: float) -> dict[str, float]:
    """By window, where a method's curve first passes a KL; windows without are missing.

    Straight between measured densities, both logarithms.
    """
    found = {}
    for window, some in rows.groupby("window"):
        points = sorted(zip(some.density, some.kl, strict=True))
        for (sparse, far), (dense, near) in pairwise(points):
            if far >= kl > near:
                share = math.log(far / kl) / math.log(far / near)
                found[str(window)] = sparse * (dense / sparse) ** share
                break
    return found


def tails(rows: pd.DataFrame) -> str:
    """The 99th percentile of KL by quarter of the window."""
    columns: dict[str, list[str]] = {"method": []}
    for name, label in METHODS.items():
        some = rows[rows.variant == name]
        if some.empty:
            continue
        columns["method"].append(label)
        for quarter, cell in _quarters(some, "p99", "{:.2f}").items():
            columns.setdefault(quarter.replace("_", " "), []).append(cell)
    return to_markdown(columns) + "\n"


def of_variants(rows: pd.DataFrame) -> str:
    """What each change is worth: KL, its ratio to the defaults' and the paired difference."""
    base = _by_window(rows, OURS)
    mean = sum(base.values()) / len(base)
    columns: dict[str, list[str]] = {}
    for name in [*VARIANTS, *sorted(set(rows.variant) - set(VARIANTS) - set(METHODS))]:
        some = rows[rows.variant == name]
        if some.empty:
            continue
        cells = {
            "variant": "the defaults" if name == OURS else name,
            "KL": f"{some.kl.mean():.4f}",
            "change, %": "" if name == OURS else f"{100 * (some.kl.mean() / mean - 1):+.0f}",
            "difference": "" if name == OURS else _difference(_by_window(rows, name), base),
            **_quarters(some, "kl", "{:.4f}"),
        }
        for column, cell in cells.items():
            columns.setdefault(column.replace("_", " "), []).append(cell)
    return to_markdown(columns) + "\n"


def _by_window(rows: pd.DataFrame, variant: str) -> dict[str, float]:
    some = rows[rows.variant == variant]
    return dict(zip(some.window, some.kl, strict=True))


def _difference(kl: dict[str, float], ours: dict[str, float]) -> str:
    found = compare_paired_values(kl, ours)
    if found.low is None:  # the same in every window
        return "none"
    return f"{found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _quarters(rows: pd.DataFrame, name: str, form: str) -> dict[str, str]:
    return {f"quarter_{i}": form.format(rows[f"{name}_q{i}"].mean()) for i in range(1, 5)}


def rewrite(text: str, make: Callable[[], dict[str, str]] = sections) -> str:
    """The page with its tables made again."""
    for name, content in make().items():
        text = replace_section(text, name, content)
    return text


def main() -> None:
    """Rewrite docs/findings.md and README.md."""
    FINDINGS.write_text(rewrite(FINDINGS.read_text()))
    README.write_text(rewrite(README.read_text(), headline))


if __name__ == "__main__":
    main()
