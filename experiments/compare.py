"""Names for settings, and what sets a run apart from dense attention on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from experiments.config import DENSE, RunConfig, parameters
from experiments.store import Record, RunStore
from pbs.methods import METHODS
from pbs.registry import Registry


def changed_parameters(registry: Registry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that differ from the dataclass's defaults."""
    changed = {}
    for entry in fields(registry.load(settings["name"])):
        if not entry.init or entry.name not in settings:
            continue
        default = entry.default
        if entry.default_factory is not MISSING:
            default = entry.default_factory()
        if settings[entry.name] != default:
            changed[entry.name] = settings[entry.name]
    return changed


def describe(method: Mapping[str, Any]) -> str:
    """A method's name with the parameters that are not at their defaults."""
    changed = changed_parameters(METHODS, method)
    return " ".join([method["name"], *(f"{key}={value}" for key, value in changed.items())])


def find_dense(cfg: RunConfig) -> RunStore | None:
    """A finished run of dense attention on the same model, bench and seed."""
    for path in sorted((cfg.group / DENSE).glob("*/metrics.json")):
        store = RunStore(path.parent)
        metrics = store.metrics()
        if metrics.get("status") == "finished" and metrics["sample_set"] == cfg.sample_set:
            return store
    return None


def dense_command(cfg: RunConfig, overrides: Sequence[str]) -> str:
    """The command that makes the dense run to compare with."""
    from experiments.bench import BENCHES

    kept = [text for text in overrides if text.startswith(("model", "seed=", "paths."))]
    bench = [
        f"bench.{key}={_text(value)}"
        for key, value in changed_parameters(BENCHES, cfg.bench).items()
    ]
    words = [f"method={DENSE}", f"bench={cfg.bench['name']}", *kept, *bench]
    return " ".join(["python run.py", *words])


def compare_with_dense(cfg: RunConfig, records: Sequence[Record]) -> dict[str, Any] | None:
    """The paired difference in accuracy or score to the dense run of the same samples.

    Returns:
        None without such a run, for dense attention itself, and for benches without right and
        wrong answers and without scores.
    """
    from experiments.statistics import compare_paired

    dense = None if cfg.method["name"] == DENSE else find_dense(cfg)
    if dense is None:
        return None
    dense_records = dense.samples()
    ours = _answers(records)
    theirs = _answers(dense_records)
    if not ours.keys() & theirs.keys():
        return _compare_scores(cfg, dense.folder.name, records, dense_records)
    return {"hash": dense.folder.name, **asdict(compare_paired(ours, theirs, partial=True))}


def _compare_scores(
    cfg: RunConfig, digest: str, records: Sequence[Record], dense_records: Sequence[Record]
) -> dict[str, Any] | None:
    """The same of real-valued scores: how the overall score differs, and which samples moved."""
    from experiments.bench import BENCHES
    from experiments.statistics import compare_paired_scores

    bench = BENCHES.load(cfg.bench["name"])(**parameters(cfg.bench))
    ours, theirs, weights = bench.paired_scores(records, dense_records)
    if not ours:
        return None
    comparison = compare_paired_scores(ours, theirs, weights=weights, partial=True)
    num_alone = len({record["sample_id"] for record in records} ^ {
        record["sample_id"] for record in dense_records
    })  # fmt: skip
    return {
        "hash": digest,
        **asdict(comparison),
        "num_unpaired": num_alone,
        "gained": sorted(sample for sample in ours if ours[sample] > theirs[sample]),
        "lost": sorted(sample for sample in ours if ours[sample] < theirs[sample]),
    }


def config_of(folder: Path) -> RunConfig:
    """The configuration of a run on disk; its outputs are where the folder lies now.

    A results folder may have been moved, or be read from another working directory.
    """
    import yaml

    cfg = RunConfig.from_dict(yaml.safe_load((folder / "config.yaml").read_text()))
    cfg.paths.outputs = str(folder.parents[3])
    return cfg


def _answers(records: Sequence[Record]) -> dict[str, bool]:
    return {
        record["sample_id"]: record["correct"]
        for record in records
        if isinstance(record.get("correct"), bool)
    }


def _text(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
