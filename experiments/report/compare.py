"""Names for settings, and what sets a run apart from dense attention on the same samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from experiments.metrics import ACCURACY, SCORE
from experiments.pairing import Pairs, pair_records
from experiments.settings.bench_names import BENCHES
from experiments.settings.config import DENSE, RunConfig, parameters
from experiments.settings.names import as_word, changed_parameters
from experiments.store import Record, RunStore
from pbs.methods import METHODS

logger = logging.getLogger(__name__)

NUM_NAMED = 5  # samples or files in a message
# What a folder that something else wrote, or cut short, can raise while it is read.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError)


def sample_family(cfg: RunConfig) -> dict[str, Any]:
    """What runs must have in common for their samples to be comparable one by one.

    The model, the seed, and the bench's parameters but for those that only say which samples are
    measured (``Bench.which_samples``): a run over two of five lengths is of the family of the
    whole. What files hold is not in it: each sample's own digest decides.
    """
    bench_class = BENCHES.load(cfg.bench["name"])
    settings = cfg.identity_without_paths("bench")
    changed = changed_parameters(BENCHES, settings)
    kept = {key: value for key, value in changed.items() if key not in bench_class.which_samples}
    return {
        "model": cfg.model_identity,
        "bench": {"name": cfg.bench["name"], **kept},
        "seed": cfg.seed,
    }


def is_plain_dense(method: Mapping[str, Any]) -> bool:
    """Whether this is the reference: dense attention with every parameter at its default."""
    return method["name"] == DENSE and not changed_parameters(METHODS, method)


def find_dense(cfg: RunConfig, records: Sequence[Record] | None = None) -> RunStore | None:
    """The run that accuracy is compared with: *the plain dense run* of this model and samples.

    Plain is the method ``flash`` with every parameter at its default: never one with another
    kernel, however many of them there are. It is of the same model, bench, seed and settings
    (:func:`sample_family`), and of several the one that shares most samples with these records,
    then the one with the same samples altogether, then the one with the smallest hash.

    Args:
        cfg: of the run to compare.
        records: its samples; default: those on disk.

    Returns:
        None if no finished plain dense run has one of these samples.
    """
    if records is None:
        records = samples_of(RunStore(cfg.folder))
    found = []
    for store, dense_cfg in dense_runs(cfg):
        if not is_plain_dense(dense_cfg.method):
            continue
        pairs = pair_records(records, samples_of(store))
        is_same = dense_cfg.sample_set == cfg.sample_set
        if pairs.ours or pairs.differing or (is_same and not records):
            found.append((-len(pairs.ours), not is_same, store.folder.name, store))
    return min(found, key=lambda entry: entry[:3])[3] if found else None


def dense_runs(cfg: RunConfig) -> list[tuple[RunStore, RunConfig]]:
    """All finished runs of dense attention, whatever its parameters, of the same family.

    One that cannot be read is left out with a warning.
    """
    family = sample_family(cfg)
    found = []
    for path in sorted((cfg.group / DENSE).glob("*/metrics.json")):
        store = RunStore(path.parent)
        if store.metrics().get("status") != "finished":
            continue
        try:
            dense_cfg = config_of(path.parent)
            if sample_family(dense_cfg) != family:
                continue
            samples_of(store)
        except READ_ERRORS as error:
            logger.warning("%s is no dense run to compare with: %s", path.parent, error)
            continue
        found.append((store, dense_cfg))
    return found


def dense_command(cfg: RunConfig, overrides: Sequence[str]) -> str:
    """The command that makes the dense run to compare with."""
    kept = [text for text in overrides if text.startswith(("model", "seed=", "paths."))]
    bench = [
        f"bench.{key}={as_word(value)}"
        for key, value in changed_parameters(BENCHES, cfg.bench).items()
    ]
    words = [f"method={DENSE}", f"bench={cfg.bench['name']}", *kept, *bench]
    return " ".join(["python run.py", *words])


def compare_with_dense(cfg: RunConfig, records: Sequence[Record]) -> dict[str, Any] | None:
    """The paired difference in the bench's metrics to the plain dense run of the same samples.

    Samples pair by their id and by what the model saw (:mod:`experiments.pairing`).

    Returns:
        None without such a run, for that run itself, and for benches without a metric that is
        paired. ``difference``, ``low``, ``high`` and ``p_value`` are of accuracy, of scores or else
        of the first metric; ``metrics`` has those of the others by their names. ``num_pairs``
        samples are compared; ``num_unpaired`` are not in the dense run, and ``differing`` names
        those that were asked something else there. Without any pair there is no ``difference``.
    """
    from experiments.statistics import compare_paired

    if is_plain_dense(cfg.method):
        return None
    dense = find_dense(cfg, records)
    if dense is None:
        return None
    pairs = pair_records(records, samples_of(dense))
    facts = {"hash": dense.folder.name, "num_pairs": len(pairs.ours)}
    counts = {
        "num_unpaired": pairs.num_alone,
        "num_differing": len(pairs.differing),
        "differing": list(pairs.differing[:NUM_NAMED]),
    }
    if not pairs.ours:
        return {**facts, **counts}
    values = _compare_values(cfg, pairs)
    ours, theirs = _answers(pairs.ours), _answers(pairs.theirs)
    if ours.keys() & theirs.keys():
        first = asdict(compare_paired(ours, theirs, partial=True))
    else:
        first = _compare_scores(cfg, pairs) or next(iter(values.values()), None)
    return None if first is None else {**facts, **first, **counts, "metrics": values}


def _compare_values(cfg: RunConfig, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """The same of every other metric that the bench declares to be paired, by its name."""
    from experiments.statistics import compare_paired_values

    found = {}
    for metric in BENCHES.load(cfg.bench["name"]).metrics:
        if not metric.is_paired or metric in (ACCURACY, SCORE):
            continue
        both = [
            (ours["sample_id"], ours[metric.name], theirs[metric.name])
            for ours, theirs in zip(pairs.ours, pairs.theirs, strict=True)
            if None not in (ours.get(metric.name), theirs.get(metric.name))
        ]
        if both:
            left, right = ({one[0]: one[side] for one in both} for side in (1, 2))
            found[metric.name] = asdict(compare_paired_values(left, right))
    return found


def _compare_scores(cfg: RunConfig, pairs: Pairs) -> dict[str, Any] | None:
    """The same of real-valued scores: how the overall score differs, and which samples moved."""
    from experiments.statistics import compare_paired_scores

    bench = BENCHES.load(cfg.bench["name"])(**parameters(cfg.bench))
    ours, theirs, weights = bench.paired_scores(pairs.ours, pairs.theirs)
    if not ours:
        return None
    return {
        **asdict(compare_paired_scores(ours, theirs, weights=weights, partial=True)),
        "gained": sorted(sample for sample in ours if ours[sample] > theirs[sample]),
        "lost": sorted(sample for sample in ours if ours[sample] < theirs[sample]),
    }


def explain_other_inputs(cfg: RunConfig) -> list[str]:
    """A sentence for each earlier run of the same settings whose files held something else."""
    notes = []
    for path in sorted((cfg.group / cfg.method["name"]).glob("*/config.yaml")):
        if path.parent.name == cfg.hash:
            continue
        try:
            other = config_of(path.parent)
            if other.identity_without_content != cfg.identity_without_content:
                continue
        except READ_ERRORS:
            continue  # not a run that could be continued
        ours, theirs = cfg.contents, other.contents
        names = sorted(
            name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
        )
        if theirs and names:
            more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
            what = f"read other files ({', '.join(names[:NUM_NAMED])}{more} changed since)"
        else:
            what = "does not say what its files held"
        notes.append(f"an earlier run of these settings {what} and stays apart: {path.parent}")
    return notes


def config_of(folder: Path) -> RunConfig:
    """The configuration of a run on disk; its outputs are where the folder lies now.

    A results folder may have been moved, or be read from another working directory.
    """
    cfg = RunConfig.from_dict(yaml.safe_load((folder / "config.yaml").read_text()))
    cfg.paths.outputs = str(folder.parents[3])
    return cfg


def samples_of(store: RunStore) -> list[Record]:
    """The samples of a run, read once until the file changes."""
    return _read_samples(store.folder, store.samples_digest())


@lru_cache(maxsize=8)
def _read_samples(folder: Path, _digest: str | None) -> list[Record]:
    return RunStore(folder).samples()


def _answers(records: Sequence[Record]) -> dict[str, bool]:
    return {
        record["sample_id"]: record["correct"]
        for record in records
        if isinstance(record.get("correct"), bool)
    }
