"""What keeps the notebooks thin: showing views of results, and trying a method without a run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
from matplotlib.figure import Figure

from experiments.pairing import pair_records
from experiments.report.runs import Results
from experiments.settings.config import ROOT, ModelConfig, RunConfig
from experiments.statistics import compare_paired
from experiments.store import Record

if TYPE_CHECKING:
    from experiments.models.load import LoadedModel
    from experiments.report.pictures.capture import CapturedCall
    from pbs.methods import AttentionMethod

# transformers loads tqdm, which misses ipywidgets in a notebook; its plain bars are enough.
warnings.filterwarnings("ignore", message="IProgress not found")

_Item = TypeVar("_Item")

EMBEDDED = ModelConfig(name="tiny", path="experiments/tiny", device="cpu")


def show(
    items: Iterable[_Item],
    *views: Callable[[_Item], object],
    otherwise: str,
) -> None:
    """Show every view of every item under the item's title; without items a sentence.

    Args:
        items: groups of runs, or times; each has a ``title``.
        views: functions of an item that give a frame, a figure, the bytes or the path of a PNG, a
            list of these, or a sentence.
        otherwise: the sentence for no items.
    """
    from IPython.display import Markdown, display

    items = list(items)
    if not items:
        display(Markdown(otherwise))
    for item in items:
        title = str(getattr(item, "title", ""))
        display(Markdown(f"### {title}"))
        for view in views:
            show_one(view(item), alt=title)


def show_one(thing: object, *, alt: str = "embedded model") -> None:
    """Show a frame, a figure, a PNG (bytes or path), a sentence, or a list of these.

    Args:
        thing: what to show.
        alt: what a picture is of, for readers who do not see it.
    """
    from IPython.display import Image, Markdown, display

    if isinstance(thing, list):
        for part in thing:
            show_one(part, alt=alt)
    elif isinstance(thing, Figure):
        buffer = io.BytesIO()
        thing.savefig(buffer, format="png")
        display(Image(buffer.getvalue(), alt=alt))
    elif isinstance(thing, bytes):
        display(Image(thing, alt=alt))
    elif isinstance(thing, Path):
        display(Image(thing.read_bytes(), alt=alt))
    else:
        display(Markdown(thing) if isinstance(thing, str) else thing)


def load_embedded() -> LoadedModel:
    """The small Llama that comes with the project, on the CPU."""
    from experiments.models.load import load_model

    return load_model(EMBEDDED)


def capture_embedded(length: int = 2048, *, layer: int = -1) -> CapturedCall:
    """Queries and keys of one layer of the embedded model on a generated question.

    Args:
        length: of the prompt, in tokens; at most 8192.
        layer: counted from the last if negative.
    """
    from experiments.benches.needle import encode_sample, num_layers
    from experiments.benches.needle_tasks import make_sample
    from experiments.report.pictures import capture_call
    from pbs import build_method

    model = load_embedded()
    sample = make_sample(
        "single", length=length, depth=0.5, index=0, seed=0, tokenizer=model.tokenizer
    )
    layer = layer % num_layers(model)
    ids = encode_sample(model, sample)
    return capture_call(model.model, ids, build_method("flash"), layer=layer)


def coverage_curve(
    call: CapturedCall, name: str, values: Sequence[float], **params: object
) -> pd.DataFrame:
    """Density and coverage of a method over its knob on captured queries and keys.

    Args:
        call: from :func:`capture_embedded`.
        name: of the method.
        values: of its knob.
        params: its other parameters.

    Returns:
        The columns ``value``, ``density`` and ``coverage``, means over heads, ascending in density.
    """
    from experiments.gate.coverage import measure_coverage
    from pbs import build_method
    from pbs.methods import METHODS

    knob = METHODS.load(name).knob
    if knob is None:
        raise ValueError(f"method {name!r} has no knob, so it has a point and no curve")
    rows = []
    for value in values:
        plan = build_method(name, **{**params, knob.name: value}).plan(
            call.q, call.k, scale=call.scale, layer_idx=call.layer_idx
        )
        coverage = measure_coverage(call.q, call.k, plan, scale=call.scale)
        rows.append(
            {
                "value": value,
                "density": float(plan.density().mean()),
                "coverage": float(coverage.mean()),
            }
        )
    return pd.DataFrame(rows).sort_values("density", ignore_index=True)


def answer_questions(
    methods: Mapping[str, AttentionMethod],
    *,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    tasks: Sequence[str] = ("single", "multi_key", "variable_tracking", "copy"),
) -> dict[str, list[Record]]:
    """Samples of ``bench=needle`` on the embedded model under each method, without run folders.

    The samples are those of the bench with seed 0: they pair with those of finished runs.
    """
    from experiments.benches.base import Context
    from experiments.benches.needle import NeedleBench

    model = load_embedded()
    bench = NeedleBench(lengths=list(lengths), depths=list(depths), tasks=list(tasks))
    records: dict[str, list[Record]] = {}
    for label, method in methods.items():
        records[label] = []
        context = Context(
            cfg=RunConfig(model=EMBEDDED),
            method=method,
            model=model,
            folder=ROOT,
            done=frozenset(),
            announce=lambda _: None,
            add=records[label].append,
        )
        bench.run(context)
    return records


def answers_table(records: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """Accuracy, density and coverage of :func:`answer_questions`, a row per method."""
    from experiments.benches.needle import measure

    keys = ("num_samples", "accuracy", "accuracy_low", "accuracy_high", "density", "coverage")
    rows = {label: {key: measure(part).get(key) for key in keys} for label, part in records.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method").round(3)


def compare_with_runs(records: Sequence[Record], results: Results) -> pd.DataFrame | str:
    """Our answers beside those of finished needle runs on the embedded model, in pairs.

    Returns:
        A row per run with a common sample: accuracies on the common samples and the difference
        (ours minus theirs, points) with its 95 % interval. Without such runs a sentence.
    """
    rows: list[dict[str, Any]] = []
    for group in results.of("needle"):
        if group.model != EMBEDDED.name:
            continue
        for run in group.runs:
            pairs = pair_records(records, run.samples())
            if not pairs.ours:
                continue
            ours = {record["sample_id"]: record["correct"] for record in pairs.ours}
            theirs = {record["sample_id"]: record["correct"] for record in pairs.theirs}
            paired = compare_paired(ours, theirs)
            rows.append(
                {
                    "finished run": run.label,
                    "pairs": paired.num_pairs,
                    "ours, %": 100 * sum(ours.values()) / len(ours),
                    "theirs, %": 100 * sum(theirs.values()) / len(theirs),
                    "difference, points": 100 * paired.difference,
                    "low": 100 * paired.low,
                    "high": 100 * paired.high,
                }
            )
    if not rows:
        return (
            f"No needle run on the embedded model in `{results.path}` shares a sample with these: "
            "make some with `make demo`."
        )
    return pd.DataFrame(rows).round(1)
