"""Runs one cell: folder, lock, resume, gate, bench, metrics, tracking. A failure is a result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.benches.base import Bench, Context
from experiments.files import to_json, write_atomically
from experiments.machine_load import LoadMeter, mean_load
from experiments.models.distributed import join_ranks
from experiments.models.load import LoadedModel, load_model
from experiments.notes import describe_truncation
from experiments.report.compare import compare_with_dense, explain_other_inputs
from experiments.report.run_pictures import draw_run
from experiments.run.matched import Calibration, calibrate
from experiments.run.tracking import Tracker
from experiments.run_environments import environments_of
from experiments.settings.bench_names import BENCHES
from experiments.settings.checks import check_lists
from experiments.settings.config import ConfigError, RunConfig, parameters
from experiments.settings.console import SampleProgress, log_to, show_messages
from experiments.settings.environment import describe_environment
from experiments.settings.failures import describe_failure, explain_failure, release_after_failure
from experiments.settings.names import describe
from experiments.store import CHANGED, Record, RunStore
from pbs.methods import METHODS, AttentionMethod, build_method
from pbs.registry import unknown

logger = logging.getLogger(__name__)

# Reports of the safety gate in this process, by model, method settings and seed.
_GATE_REPORTS: dict[str, dict[str, Any]] = {}


def run_cell(composed: DictConfig, overrides: Sequence[str] | None = None) -> Path:
    """Run what Hydra composed, unless it is finished; returns the run's folder.

    Args:
        composed: the whole configuration.
        overrides: the words it was composed with; default: those of the command line.

    Raises:
        ConfigError: a setting has no value or one that nothing can be run with, or the results
            cannot be written. All other failures are recorded in ``metrics.json`` and do not
            raise, so that a sweep goes on.
    """
    show_messages()
    _check_folder_stays()
    with join_ranks(RunConfig.from_hydra(composed)) as cfg:
        try:
            return _run_cell(cfg, _overrides() if overrides is None else list(overrides))
        except OSError as error:  # of this run's own files: nothing can be recorded
            raise ConfigError(
                f"{_title(cfg)}: cannot write the results: {explain_failure(error)}"
            ) from error


def _run_cell(cfg: RunConfig, overrides: list[str]) -> Path:
    if cfg.match is not None and METHODS.load(cfg.method["name"]).knob is None:
        logger.info("%s has no knob to match with: it runs as it is", cfg.method["name"])
        cfg = replace(cfg, match=None)
    calibration = None
    if cfg.match is not None:
        try:
            cfg, calibration = calibrate(cfg, lambda: build_bench(cfg.bench))
        except Exception as error:  # as below: a cell's failure is a result
            failure = describe_failure(error)
            logger.exception("%s: failed: %s: %s", _title(cfg), failure["type"], failure["message"])
            release_after_failure()
            return _record_failed_calibration(cfg, overrides, failure)
    store = RunStore(cfg.folder)
    with store.lock(), log_to(store.log_path):
        if calibration is None or calibration.is_reachable:
            try:
                _run_locked(cfg, store, overrides, calibration)
            except KeyboardInterrupt as error:
                count = len(store.samples())
                error.args = (f"{_title(cfg)}: {count} samples are kept in {store.folder}",)
                raise
        else:
            _record_unreachable(cfg, store, overrides, calibration)
    return cfg.folder


def build_bench(settings: Mapping[str, Any]) -> Bench:
    """Make a bench from its settings, as :func:`pbs.build_method` makes a method.

    Raises:
        ValueError: unknown name or parameter, or a value outside its range.
    """
    bench_class = BENCHES.load(settings["name"])
    valid = [entry.name for entry in fields(bench_class) if entry.init]
    for param in parameters(settings):
        if param not in valid:
            raise ValueError(unknown(f"parameter of bench {settings['name']!r}:", param, valid))
    check_lists(bench_class, parameters(settings), "bench")
    bench: Bench = bench_class(**parameters(settings))
    return bench


def _run_locked(
    cfg: RunConfig, store: RunStore, overrides: list[str], calibration: Calibration | None
) -> None:
    title = _title(cfg)
    if not cfg.resume:
        store.clear()
    metrics = store.metrics()
    is_finished = metrics.get("status") == "finished"
    if is_finished and not store.is_open:
        num_samples = metrics["results"]["total"]["num_samples"]
        logger.info(
            "%s: finished: %d samples, nothing to do (resume=false runs it again), %s",
            title,
            num_samples,
            store.folder,
        )
        return
    if is_finished:
        logger.info("%s: ended after its last sample, before its pictures: making them", title)
    elif metrics.get("error", {}).get("type") == CHANGED:
        logger.error("%s: %s", title, metrics["error"]["message"])
        return
    elif metrics:
        logger.info("%s: %s earlier, trying again", title, metrics["status"])
        store.metrics_path.unlink()
    for note in explain_other_inputs(cfg):
        logger.info("%s: %s", title, note)
    store.open()
    environment = describe_environment()
    facts = _write_facts(cfg, store, overrides, environment, calibration)
    tracker = Tracker(cfg.logger, cfg.paths)
    tracker.start(
        cfg.hash,
        name=describe(cfg.method),
        group=f"{cfg.bench['name']}/{cfg.model_name}",
        kind="cell",
        config={**cfg.to_dict(), "hash": cfg.hash, "environment": environment},
    )
    try:
        bench, context, results = _measure(cfg, store, tracker, title, environment["id"])
    except Exception as error:  # the one boundary: a cell's failure is a result
        # The terminal shows the message only, run.log the traceback too.
        failure = describe_failure(error)
        logger.exception("%s: failed: %s: %s", title, failure["type"], failure["message"])
        release_after_failure()
        if not is_finished:
            store.write_metrics({**facts, "error": failure})
        tracker.finish({"status": "failed", "error": failure["message"]}, failed=True)
        store.close()
        return
    metrics = {**facts, **results, "status": "finished"}
    if bench.failures:
        metrics |= {"status": "failed", "error": _describe_failures(bench.failures)}
    if calibration is not None:
        total = metrics["results"]["total"]
        metrics["match"] = {**facts["match"], "measured": total.get(calibration.quantity)}
    store.write_metrics(metrics)
    truncated = describe_truncation(metrics["results"])
    if truncated is not None:
        logger.warning("%s: truncated: %s", title, truncated)
    pictures = _draw(bench, context)
    tracker.finish(
        _summary(metrics),
        table=metrics["results"]["cells"],
        pictures=pictures,
        failed=bool(bench.failures),
    )
    store.close()
    logger.info("%s: %s in %.0f s, %s", title, metrics["status"], metrics["seconds"], store.folder)


def _title(cfg: RunConfig) -> str:
    return f"{cfg.bench['name']} · {cfg.model_name} · {describe(cfg.method)}"


def _write_facts(
    cfg: RunConfig,
    store: RunStore,
    overrides: list[str],
    environment: dict[str, Any],
    calibration: Calibration | None,
) -> dict[str, Any]:
    """Write what is known before measuring; returns what every ``metrics.json`` says."""
    store.write_config(cfg.to_dict())
    store.write_environment(environment)
    facts = {
        "status": "failed",
        "bench": cfg.bench["name"],
        "model": cfg.model_name,
        "method": cfg.method["name"],
        "label": describe(cfg.method),
        "hash": cfg.hash,
        "sample_set": cfg.sample_set,
        "overrides": overrides,
        "device": environment["device"],
    }
    if calibration is not None:
        facts["match"] = calibration.facts()
        text = to_json(asdict(calibration), indent=2)
        write_atomically(store.folder / "calibration.json", text + "\n")
    return facts


def _record_unreachable(
    cfg: RunConfig, store: RunStore, overrides: list[str], calibration: Calibration
) -> None:
    """A target that no value of the knob meets: nothing is measured, and the result says so."""
    logger.warning("%s: %s", _title(cfg), calibration.explain())
    if store.metrics().get("match") == calibration.facts():
        return
    facts = _write_facts(cfg, store, overrides, describe_environment(), calibration)
    error = {"type": "Unreachable", "message": calibration.explain()}
    store.write_metrics({**facts, "status": "unreachable", "error": error})


def _record_failed_calibration(
    cfg: RunConfig, overrides: list[str], failure: Mapping[str, str]
) -> Path:
    """A cell that failed before its knob was set."""
    store = RunStore(cfg.folder)
    with store.lock():
        facts = _write_facts(cfg, store, overrides, describe_environment(), None)
        store.write_metrics({**facts, "error": failure})
    return cfg.folder


def _measure(
    cfg: RunConfig, store: RunStore, tracker: Tracker, title: str, environment: str
) -> tuple[Bench, Context, dict[str, Any]]:
    """Everything between an empty or half-filled folder and its metrics."""
    torch.manual_seed(cfg.seed)
    bench = build_bench(cfg.bench)
    bench.prepare(cfg)
    method = build_method(cfg.method["name"], **parameters(cfg.method))
    model = load_model(cfg.model) if bench.needs_model else None
    gate = None
    if cfg.check and model is not None:
        gate = _check(cfg, model, method)
    done = store.samples()
    tracker.log_earlier(done)
    with store.appending() as appender, SampleProgress(title) as progress:
        num_done = len(done)

        def add(record: Record) -> None:
            nonlocal num_done
            # What a worker or a bench says of its own goes before.
            record = {"environment": environment, "load": meter.lap(), **record}
            appender.append(record)
            num_done += 1
            tracker.log_sample(record, num_done)
            progress.advance()

        context = Context(
            cfg=cfg,
            method=method,
            model=model,
            folder=store.folder,
            done=frozenset(record["sample_id"] for record in done),
            announce=lambda total: progress.start(total, len(done)),
            add=add,
            records=store.samples,
        )
        meter = LoadMeter()
        bench.run(context)
    records = store.samples()
    results = {
        "samples_digest": store.samples_digest(),
        "environments": environments_of(records),
        "load": mean_load(records),
        "partial": bench.is_partial,
        "seconds": sum(record.get("seconds", 0.0) for record in records),
        "results": bench.summarise(records),
        "against_dense": compare_with_dense(cfg, records),
        "gate": gate,
        "failures": bench.failures,
    }
    return bench, context, results


def _draw(bench: Bench, context: Context) -> list[Path]:
    """The run's pictures; the result is on disk, so a picture that fails costs a warning."""
    try:
        return draw_run(bench, context)
    except (ValueError, RuntimeError, OSError, MemoryError, ImportError) as error:
        logger.warning("no picture of this run: %s", explain_failure(error))
        return []


def _check(cfg: RunConfig, model: LoadedModel, method: AttentionMethod) -> dict[str, Any]:
    """The safety gate, once per process for a model, a method's settings and a seed.

    Raises:
        GateError: the method is wrong on this model; nothing was measured.
    """
    from experiments.gate.safety import run_gate

    key = repr((cfg.model, cfg.method, cfg.seed))
    if key not in _GATE_REPORTS:
        report = run_gate(model.model, model.tokenizer, method, device=model.device, seed=cfg.seed)
        _GATE_REPORTS[key] = report.to_dict()
        logger.info("safety gate passed in %.1f s", report.seconds)
    return _GATE_REPORTS[key]


def _summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers a tracker shows for the run."""
    total = metrics["results"]["total"]
    numbers = {key: value for key, value in total.items() if isinstance(value, int | float)}
    return {"status": metrics["status"], "partial": metrics["partial"], **numbers}


def _describe_failures(failures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The error of a run in which some parts failed; each part's own stands under "failures"."""
    named = [
        f"{part} ({failure['type']}: {failure['message']})" for part, failure in failures.items()
    ]
    return {
        "type": "PartsFailed",
        "message": f"{len(named)} parts failed: {'; '.join(named)}",
        "traceback": "\n".join(failure["traceback"] for failure in failures.values()),
    }


def _check_folder_stays() -> None:
    """Relative paths mean the folder of the command, in every cell and in the table at the end."""
    if HydraConfig.initialized() and HydraConfig.get().job.chdir:
        raise ConfigError(
            "hydra.job.chdir is not supported: results go to paths.outputs; leave it out"
        )


def _overrides() -> list[str]:
    """What the user typed for this cell, with the model in any case."""
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    typed = list(hydra.overrides.task)
    if any(text.startswith("model=") for text in typed):
        return typed
    return [f"model={hydra.runtime.choices['model']}", *typed]
