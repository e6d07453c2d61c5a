"""What lies in the folder of a bench and model, over all its runs: which runs, which pictures.

A command adds its runs to what is there. The table is over all finished runs of the group. A
picture shows runs of one set of samples: the group's own folder has those of the largest set, every
other set has a folder ``samples-<sample set>`` beside the methods. So a command over fewer samples
overwrites nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.report.compare import config_of
from experiments.report.run_pictures import draw_together
from experiments.settings.config import DENSE
from experiments.store import RunStore

PICTURE = "accuracy_density.png"
MARKER = ".compared"  # written when everything over a group's runs is drawn and tracked


def runs_of_group(group: Path, cells: Sequence[Path]) -> list[Path]:
    """These run folders, in their order, and all other finished ones: dense first, others last."""
    others = [folder for folder in _finished(group) if folder not in cells]
    dense = [folder for folder in others if folder.parent.name == DENSE]
    return [*dense, *cells, *(folder for folder in others if folder not in dense)]


def is_stale(group: Path, cells: Sequence[Path]) -> bool:
    """Whether a run is newer than what is drawn; if none is, there is nothing to draw or track."""
    marker = group / MARKER
    metrics = [path for path in (cell / "metrics.json" for cell in cells) if path.exists()]
    if not marker.exists() or not (group / PICTURE).exists():
        return True
    return any(path.stat().st_mtime > marker.stat().st_mtime for path in metrics)


def draw_group(group: Path, cells: Sequence[Path]) -> list[Path]:
    """Draw the pictures over all finished runs that share their samples with one of the cells.

    Returns:
        The folders of these pictures.
    """
    metrics = {folder: RunStore(folder).metrics() for folder in _finished(group)}
    sets: dict[str, list[Path]] = {}
    for folder, content in metrics.items():
        sets.setdefault(content["sample_set"], []).append(folder)
    largest = max(
        sorted(sets),
        key=lambda name: _size([metrics[folder] for folder in sets[name]]),
        default="",
    )
    wanted = {config_of(cell).sample_set for cell in cells}
    marker = group / MARKER
    before = marker.read_text().strip() if marker.exists() else ""
    if before != largest:  # the group's own pictures change hands
        wanted |= {largest, before}
    places = []
    for name in sorted(wanted & sets.keys()):
        place = group if name == largest else group / f"samples-{name}"
        _draw(group, sets[name], [metrics[folder] for folder in sets[name]], place)
        places.append(place)
    marker.write_text(f"{largest}\n")
    return places


def _finished(group: Path) -> list[Path]:
    paths = sorted(group.glob("*/*/metrics.json"))
    return [
        path.parent for path in paths if RunStore(path.parent).metrics()["status"] == "finished"
    ]


def _size(metrics: Sequence[dict[str, Any]]) -> int:
    """Samples of the largest of these runs."""
    return max(content["results"]["total"].get("num_samples") or 0 for content in metrics)


def _draw(
    group: Path, folders: Sequence[Path], metrics: Sequence[dict[str, Any]], place: Path
) -> None:
    """Accuracy against density of these runs, and what else the bench draws over them."""
    runs = []
    for content in metrics:
        total = content["results"]["total"]
        if total.get("accuracy") is None or total.get("density") is None:
            continue
        runs.append(
            {
                **{key: content[key] for key in ("method", "bench", "model")},
                **{key: total[key] for key in ("accuracy", "density", "num_samples")},
                "setting": content["label"].partition(" ")[2],
            }
        )
    place.mkdir(exist_ok=True)
    if runs:
        from experiments.report.pictures import draw_accuracy_density

        draw_accuracy_density(pd.DataFrame(runs), place / PICTURE)
    draw_together(group.parent.name, folders, place)
