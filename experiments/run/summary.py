"""What a command ends with: one table over its cells, the pictures, and where everything lies."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.files import remove_scratch
from experiments.report.scores import report_scores
from experiments.report.table import Row, make_rows, metrics_in, reading_notes, show, write
from experiments.report.timing_table import timing_notes, write_table7
from experiments.run.group_files import draw_group, is_stale, runs_of_group
from experiments.run.tracking import Tracker
from experiments.settings.config import LoggerConfig, PathsConfig
from experiments.settings.console import show_messages
from experiments.settings.ranks import is_follower

logger = logging.getLogger(__name__)

SECONDS_OF_A_WRITE = 3600.0  # at most, by a process that works on the same group


def report(
    folders: Sequence[Path],
    *,
    figure: str | None = None,
    tracking: tuple[LoggerConfig, PathsConfig] | None = None,
) -> int:
    """Print the table of these runs, draw their pictures. Returns the exit status: 1 if one failed.

    Args:
        folders: run folders, in the order they ran.
        figure: a figure of the paper to draw over them.
        tracking: the command's own settings of W&B: a results folder may be somebody else's, and
            what its configs say is not where to write; None tracks nothing.
    """
    show_messages()
    if is_follower():  # another process writes the results
        return 0
    groups: dict[Path, list[Path]] = {}
    for folder in folders:
        cells = groups.setdefault(folder.parent.parent, [])
        if folder not in cells:
            cells.append(folder)
    is_failed = False
    for group, cells in groups.items():
        remove_scratch(group, older_than=SECONDS_OF_A_WRITE)
        rows = make_rows(cells)
        is_failed |= any(row["status"] not in ("finished", "unreachable") for row in rows)
        show(group, rows)  # first: a full disk must not hide it
        everything = runs_of_group(group, cells)
        all_rows = make_rows(everything)
        write(group, all_rows)
        report_scores(group, cells, everything, reading_notes(all_rows))
        tables = write_table7(group, all_rows)
        is_new = is_stale(group, cells)
        places = draw_group(group, cells) if is_new else []
        if figure is not None:
            _draw_figure(figure, group, cells)
        folders = dict.fromkeys((group, *places, *cells))
        pictures = [path for folder in folders for path in sorted(folder.glob("*.png"))]
        for note in [*_notes(group, rows, pictures), *(f"table: {path}" for path in tables)]:
            logger.info("%s", note)
        if is_new and tracking is not None:
            _track(Tracker(*tracking), group, cells, rows, pictures)
    return int(is_failed)


def _draw_figure(name: str, group: Path, cells: Sequence[Path]) -> None:
    """The results are on disk, so a figure that lacks one of its runs costs a warning."""
    from experiments.report.pictures.paper import draw_figure

    try:
        draw_figure(name, cells, group)
    except ValueError as error:
        logger.warning("no %s: %s", name, error)


# What brackets hold, by the interval that a metric declares.
INTERVALS = {
    "wilson": "{} and difference 95 % intervals (Wilson; paired, Newcombe)",
    "student": "{} and difference 95 % intervals (Student; paired)",
    None: "difference of the overall {}s 95 % interval (paired, Student with two added pairs)",
}


def _notes(group: Path, rows: Sequence[Row], pictures: Iterable[Path]) -> list[str]:
    """What to know and where to look."""
    notes = []
    if any(row.get("is_timing") for row in rows):
        notes += timing_notes(rows)
    else:
        metrics = [metric for metric in metrics_in(rows) if metric.is_paired]
        texts = [INTERVALS[metric.interval].format(metric.name) for metric in metrics]
        if any(row.get("prefill_seconds") for row in rows):
            texts.append(
                "time 20th to 80th percentile; (n = 2): only the median, of too few times for "
                "percentiles"
            )
        if any(row["status"] == "finished" for row in rows):
            notes += [f"brackets: {', '.join(texts)}"] if texts else []
    notes += reading_notes(rows)
    commands = {row["dense_command"]: None for row in rows if row["dense_command"]}
    notes += [f"no dense run to compare with; make it with: {command}" for command in commands]
    # What a failed cell said stands above, where it failed.
    notes += [
        f"failed: {row['label']}, see {row['path']}/metrics.json"
        for row in rows
        if row["status"] == "failed"
    ]
    notes += [
        f"{row['status']}: {row['label']}: {_first_line(row['error'])} ({row['path']}/metrics.json)"
        for row in rows
        if row["status"] in ("unreachable", "broken")
    ]
    table = f"{group / 'summary.csv'} and summary.md (all finished runs there)"
    notes.append(f"results: {group}, table: {table}")
    notes += [f"picture: {path}" for path in pictures]
    return notes


def _first_line(text: str) -> str:
    return text.split("\n")[0]


def _track(
    tracker: Tracker,
    group: Path,
    cells: Sequence[Path],
    rows: Sequence[Row],
    pictures: Sequence[Path],
) -> None:
    """The comparison as a W&B run of its own, one per bench and model."""
    name = f"{group.parent.name}-{group.name}"
    tracker.start(
        f"comparison-{name}",
        name=f"comparison {name}",
        group=f"{group.parent.name}/{group.name}",
        kind="comparison",
        config={"cells": [cell.name for cell in cells]},
    )
    if any(row.get("is_timing") for row in rows):
        shown = ["speed_up", "speed_up_low", "speed_up_high"]
    else:
        shown = [key for metric in metrics_in(rows) for key in metric.keys]
    numbers = {f"{name}/{row['label']}": row.get(name) for row in rows for name in shown}
    tracker.finish(numbers, table=rows, pictures=pictures)
