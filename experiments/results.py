"""All runs as one table: ``experiments.results.load()``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.store import RunStore

# Columns that are there even without a single run; every method adds `method.<parameter>`.
COLUMNS = (
    "bench",
    "model",
    "method",
    "hash",
    "status",
    "partial",
    "seed",
    "task",
    "length",
    "num_samples",
    "num_correct",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "density",
    "coverage",
    "num_coverage_samples",
    "num_truncated",
    "prefill_seconds",
    "prefill_p20",
    "prefill_p80",
    "error",
    "device",
    "commit",
    "time",
    "path",
)


def load(path: str | Path = "outputs", *, unfinished: bool = False) -> pd.DataFrame:
    """Every finished run, one row per measured cell (for needle: a task at a length).

    Args:
        path: root of the run folders.
        unfinished: also give one row, without numbers, to every failed, interrupted or broken run;
            the columns ``status`` and ``error`` say what happened. Without it they are named in a
            warning.

    Returns:
        The columns ``COLUMNS``, ``method.<parameter>``, and whatever else the benches measure.
        Empty, with these columns, if there are no runs.
    """
    finished: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for folder in find_runs(path):
        run = _read(folder)
        if run["status"] != "finished":
            others.append(run)
            continue
        finished += [{**_of_its_method(run, cell, folder), **cell} for cell in _cells(folder)]
    if others and not unfinished:
        named = "; ".join(f"{run['path']}: {run['status']}, {run['error']}" for run in others)
        warnings.warn(
            f"{len(others)} runs without a result are left out (unfinished=True shows them): "
            f"{named}",
            stacklevel=2,
        )
    rows = finished + (others if unfinished else [])
    frame = pd.DataFrame(rows)
    return frame.reindex(columns=[*COLUMNS, *(c for c in frame.columns if c not in COLUMNS)])


def find_runs(path: str | Path = "outputs") -> Iterator[Path]:
    """Folders of runs: ``<path>/<bench>/<model>/<method>/<hash>`` with a config.yaml."""
    for config in sorted(Path(path).glob("*/*/*/*/config.yaml")):
        yield config.parent


def load_samples(folder: str | Path) -> pd.DataFrame:
    """The samples of one run, a row each."""
    return pd.DataFrame(RunStore(Path(folder)).samples())


def _read(folder: Path) -> dict[str, Any]:
    """What is the same for all cells of a run."""
    bench, model, method, digest = folder.parts[-4:]
    run = {
        "bench": bench,
        "model": model,
        "method": method,
        "hash": digest,
        "path": str(folder),
        "status": "interrupted",
        "error": "no metrics.json; the same command continues it",
    }
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        metrics = RunStore(folder).metrics()
        environment = folder / "env.json"
        env = json.loads(environment.read_text()) if environment.exists() else {}
        run |= {key: env.get(key) for key in ("device", "commit", "time")}
        run |= {"seed": config["seed"]}
        run |= {f"method.{key}": value for key, value in config["method"].items() if key != "name"}
        if metrics:
            error = metrics.get("error")
            match = metrics.get("match") or {}
            run |= {f"match.{key}": value for key, value in match.items()}
            run |= {
                "status": metrics["status"],
                "partial": metrics.get("partial"),
                "error": f"{error['type']}: {error['message']}" if error else None,
            }
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        run |= {"status": "broken", "error": f"{type(error).__name__}: {error}"}
    return run


def _of_its_method(run: dict[str, Any], cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The run's facts; of a method timed beside the run's own, with that method's settings."""
    if not cell.get("is_beside"):
        return run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    settings = config["bench"]["beside"][cell["variant"]]
    own = {key: None if key.startswith("method.") else value for key, value in run.items()}
    params = {f"method.{key}": value for key, value in settings.items() if key != "name"}
    return {**own, "method": settings["name"], **params}


def _cells(folder: Path) -> list[dict[str, Any]]:
    """The measured cells of a finished run; lists and tables inside them stay in metrics.json."""
    cells = RunStore(folder).metrics()["results"]["cells"]
    return [
        {key: value for key, value in cell.items() if not isinstance(value, dict | list)}
        for cell in cells
    ]
