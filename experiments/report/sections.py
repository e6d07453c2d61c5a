"""What a report says, section by section; :mod:`experiments.report.page` says how it looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
import yaml
from matplotlib.figure import Figure

from experiments.notes import describe_truncation
from experiments.report import coverage_views, figures, tables, time_figures
from experiments.report.beside_published import compared_scores
from experiments.report.device_tables import TITLE7, beside_table7
from experiments.report.missing import missing_table, nothing_yet
from experiments.report.runs import Group, Results
from experiments.report.table import Row, reading_notes
from experiments.report.times import (
    Times,
    all_times,
    break_even_table,
    committed_times,
    load_note,
    timing_table,
)

# What a run's environment may differ in without being another environment.
VARYING = ("time", "resumed_from", "earlier")
# Pictures of commands over all runs that the report draws itself.
DRAWN_ANEW = ("accuracy_density.png", "coverage_density.png")


@dataclass(frozen=True)
class Text:
    """A paragraph; `words` between backticks are code."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a caption; the index is shown if it has a name."""

    frame: pd.DataFrame
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture drawn from the results.

    Attributes:
        figure: the picture.
        name: of its file, without folder and suffix.
        alt: what it shows, in words.
    """

    figure: Figure
    name: str
    alt: str


@dataclass(frozen=True)
class Photo:
    """A picture that something else has drawn.

    Attributes:
        png: its bytes.
        name: of its file, without folder and suffix.
        alt: what it shows, in words.
    """

    png: bytes
    name: str
    alt: str


@dataclass(frozen=True)
class Details:
    """Plain text behind a heading."""

    title: str
    text: str


Block = Text | Table | Picture | Photo | Details


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        blocks: what stands in it.
        is_brief: whether it also stands in the Markdown version.
    """

    title: str
    blocks: tuple[Block, ...]
    is_brief: bool = True

    @property
    def anchor(self) -> str:
        """A name for links."""
        return _file_name(self.title)


def make_sections(results: Results) -> list[Section]:
    """The whole report."""
    sections = [Section("Overview", tuple(_overview(results)))]
    sections += [Section(group.title, tuple(_answers(group))) for group in results.answering]
    sections += [Section(group.title, tuple(_coverage(group))) for group in results.of("coverage")]
    by_title = groupby(all_times(results), key=lambda times: times.title)
    sections += [
        Section(title, tuple(block for times in parts for block in _times(times)))
        for title, parts in by_title
    ]
    sections.append(Section("Ours and published", tuple(_published(results))))
    sections.append(Section("What is missing", tuple(_missing(results))))
    if results.runs:
        pictures = tuple(_pictures(results))
        if pictures:
            sections.append(Section("Pictures of the runs", pictures, is_brief=False))
        sections.append(Section("Environments", tuple(_environments(results)), is_brief=False))
        sections.append(Section("Settings", tuple(_settings(results)), is_brief=False))
    return sections


def _overview(results: Results) -> Iterator[Block]:
    if not results.runs:
        yield Text(nothing_yet(results))
        return
    yield Table(tables.overview(results))
    yield Text(
        "Density: computed tiles over the tiles of dense causal attention. Coverage: share of "
        "dense attention's probability on what is computed. Brackets: 95 % intervals (accuracy: "
        "Wilson; difference: paired on the same samples), times: 20th to 80th percentile, or how "
        "many times there are (n) where these are too few. Numbers in the pictures are the rows of "
        "the table above them."
    )


def _answers(group: Group) -> Iterator[Block]:
    yield Table(tables.score_table(group), caption=_measured_on(group))
    yield from _based_on(group.rows)
    name = tables.main_metric(group).name
    yield from _drawn(figures.draw_pareto, group, f"{name} against density and prefill time")
    yield from _drawn(figures.draw_differences, group, "paired differences to dense attention")
    if any(row.get("coverage") is not None for row in group.rows):
        yield from _drawn(figures.draw_coverage, group, "coverage against density")
    wins = tables.wins(group)
    if isinstance(wins, str):
        yield Text(wins)
        return
    yield Table(wins, caption="Which sparse run is best how often; ties go to the lower density.")
    yield Table(tables.winners(group), caption="Cell by cell; a lead of few samples is no proof.")


def _coverage(group: Group) -> Iterator[Block]:
    yield Table(tables.score_table(group), caption=_measured_on(group))
    yield from _based_on(group.rows)
    for number, png in enumerate(coverage_views.drawn_together(group), start=1):
        alt = f"{group.title}: coverage against density of all runs"
        yield Photo(png, _file_name(f"{group.title} curves {number}"), alt)
    needed = coverage_views.needed_density(group)
    if isinstance(needed, str):
        yield Text(needed)
    else:
        yield Table(needed, caption="Density needed for a coverage, %; less is better.")


def _times(times: Times) -> Iterator[Block]:
    caption = (
        f"Medians with 20th and 80th percentile (n: too few times), {times.device}; waits: what a "
        "caller waits for one synchronised call."
    )
    yield Table(timing_table(times), caption=caption)
    if note := load_note(times):
        yield Text(note)
    truncated = describe_truncation({"cells": times.records})
    if truncated is not None:
        yield Text(f"Truncated: {truncated}.")
    yield from _drawn(time_figures.draw_breakdown, times, "stages of each method")
    yield from _drawn(time_figures.draw_speed_up, times, "speed-up against length")
    yield from _drawn(time_figures.draw_floor, times, "measured time over the floor")
    points = break_even_table(times)
    yield Text(points) if isinstance(points, str) else Table(points, caption="Break-even lengths.")


def _based_on(rows: Sequence[Row]) -> Iterator[Block]:
    """What is compared with what, samples of coverage, truncated prompts."""
    notes = reading_notes(rows)
    if notes:
        yield Text(". ".join(note[0].upper() + note[1:] for note in notes) + ".")


def _published(results: Results) -> Iterator[Block]:
    for heading, frame in compared_scores(results):
        yield Table(frame, caption=heading)
    found = list(beside_table7([*committed_times(), *all_times(results)]))
    for source, table, note in found:
        yield Table(pd.DataFrame(table), caption=f"{TITLE7}: {source}. {note}")
    if not found:
        yield Text(
            "No times at the heads and densities of the paper's Table 7; a GPU gives them in "
            "minutes: `make bench-gpu`, or `python run.py experiment=table7`."
        )


def _missing(results: Results) -> Iterator[Block]:
    frame = missing_table(results)
    frame["command"] = [f"`{command}`" if command else "" for command in frame["command"]]
    yield Table(frame)


def _pictures(results: Results) -> Iterator[Block]:
    """What runs have drawn: figures over a folder's runs, and an attention map per method."""
    folders = dict.fromkeys(run.folder.parent.parent for run in results.runs)
    for folder in folders:
        for path in sorted(folder.glob("*.png")):
            if path.name not in DRAWN_ANEW:
                alt = f"{path.stem} of {folder.parent.name} on {folder.name}"
                yield Photo(path.read_bytes(), _file_name(alt), alt)
    for group in results.groups:
        seen = set()
        for run in group.runs:
            path = run.folder / "attention_map.png"
            if path.is_file() and run.method not in seen:
                seen.add(run.method)
                alt = f"Attention map of {run.label}, {group.title}"
                yield Photo(path.read_bytes(), _file_name(alt), alt)


def _environments(results: Results) -> Iterator[Block]:
    """Each environment once, with the runs made in it."""
    runs: dict[str, list[str]] = {}
    for run in results.runs:
        env = {key: value for key, value in run.environment.items() if key not in VARYING}
        runs.setdefault(json.dumps(env, sort_keys=True), []).append(run.digest)
    if len(runs) > 1:
        yield Text(
            f"The runs come from {len(runs)} environments: compare times only within one device, "
            "and scores of two commits with care."
        )
    for number, (text, digests) in enumerate(runs.items(), start=1):
        env = json.loads(text)
        dirty = ", with changes that are not committed" if env.get("is_dirty") else ""
        title = f"{number}: {env.get('device')}, commit {_commit(env)}{dirty}"
        body = yaml.safe_dump(env, sort_keys=False)
        yield Details(f"{title} ({len(digests)} runs)", f"{body}runs: {', '.join(digests)}\n")


def _settings(results: Results) -> Iterator[Block]:
    for group in results.groups:
        for run in group.runs:
            text = yaml.safe_dump(dict(run.config), sort_keys=False)
            yield Details(f"{group.title}: {run.label} ({run.digest})", text)


def _drawn(
    draw: Callable[[Group], Figure | str] | Callable[[Times], Figure | str],
    source: Group | Times,
    what: str,
) -> Iterator[Block]:
    """A picture, or the sentence that says why there is none."""
    drawn = draw(source)  # type: ignore[arg-type]
    if isinstance(drawn, str):
        yield Text(drawn)
        return
    alt = f"{source.title}: {what}"
    yield Picture(drawn, _file_name(alt), alt)


def _commit(environment: Mapping[str, Any]) -> str:
    return str(environment.get("commit") or "unknown")[:12]


def _file_name(text: str) -> str:
    """Letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() or c in "_." else " " for c in text.lower()).split())


def _measured_on(group: Group) -> str:
    """Devices and commits of a group, and a warning where they differ."""
    devices = sorted({str(run.metrics.get("device")) for run in group.runs})
    commits = sorted({_commit(run.environment) for run in group.runs})
    text = f"On {', '.join(devices)}; commit {', '.join(commits)}."
    if len(devices) > 1:
        text += " Several devices: compare times only within one."
    return text
