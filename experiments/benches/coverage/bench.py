"""``bench=coverage``: attention mass kept against density, per layer and head, over a knob.

The model runs once per prompt, with dense attention. In every layer the method plans for the very
same queries and keys, at its own setting and at further values of its knob, and exact coverage is
measured for all these plans at once: they share the dense softmax, which is what costs time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.benches.base import Bench, Context
from experiments.benches.coverage.settings import Setting, find_values, settings_of, spread_values
from experiments.benches.coverage.texts import Prompt, check_text, make_prompts
from experiments.benches.text_files import NEEDLE, text_files
from experiments.content import input_digest
from experiments.settings.config import ConfigError, RunConfig
from experiments.store import Record
from pbs.methods import METHODS, build_method

if TYPE_CHECKING:
    import torch

    from experiments.models.load import LoadedModel
    from pbs.methods import AttentionMethod, Knob
    from pbs.methods.base import CallRecord
    from pbs.ops.plan import AttentionPlan

    See = Callable[[CallRecord], None]

# Digits of densities and coverages in the records.
DIGITS = 7


@dataclass(kw_only=True)
class CoverageBench(Bench):
    """Exact coverage and density of every layer and head.

    Args:
        text: "needle" (generated questions, as in bench=needle), "generated" (random token ids) or
            a file: plain text, or JSON (lines) with a text under "context" each.
        lengths: of the prompts, in tokens.
        num_prompts: prompts of each length; ``limit`` lowers it.
        layers: layers to measure; default all that ask the method.
        heads: query heads to measure; default all.
        values: of the method's knob, besides its own setting; default: ``num_values`` over the
            knob's range. A method without a knob has its own setting only.
        num_values: see ``values``; 0: the own setting only.
        densities: instead of ``values``: values for which the mean density comes nearest to these,
            found on the first prompt of each length, to compare methods whose knobs differ.
        num_rows: queries to measure on, one of each of this many equal stretches; null for all.
    """

    which_samples = ("limit", "lengths", "num_prompts", "layers")

    text: str = NEEDLE
    lengths: list[int] = field(default_factory=lambda: [2048, 8192])
    num_prompts: int = 1
    layers: list[int] | None = None
    heads: list[int] | None = None
    values: list[float] | None = None
    num_values: int = 10
    densities: list[float] | None = None
    num_rows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lengths", "layers", "heads", "values", "densities"):
            chosen = getattr(self, name)
            if chosen is not None and len(set(chosen)) < len(chosen):
                raise ValueError(f"bench.{name} must name each once, got {chosen}")
        if not self.lengths or min(self.lengths) < 2 or self.num_prompts < 1:
            raise ValueError(
                "bench.lengths must be one or more numbers of at least 2, and bench.num_prompts at "
                f"least 1, got {self.lengths} and {self.num_prompts}"
            )
        for name in ("layers", "heads"):
            chosen = getattr(self, name)
            if chosen is not None and (not chosen or min(chosen) < 0):
                raise ValueError(f"bench.{name} must be null or numbers from 0, got {chosen}")
        if self.densities is not None and self.values is not None:
            raise ValueError("give bench.values or bench.densities, not both")
        if any(not 0 < density < 1 for density in self.densities or ()):
            raise ValueError(f"bench.densities must lie in (0, 1), got {self.densities}")
        if self.num_values < 0 or (self.num_rows is not None and self.num_rows < 1):
            raise ValueError(
                "bench.num_values must be at least 0, and bench.num_rows at least 1 or null for "
                f"all, got {self.num_values} and {self.num_rows}"
            )

    @classmethod
    def input_files(cls, settings: Mapping[str, Any]) -> dict[str, Path]:
        """See the base class."""
        return text_files("text", settings["text"])

    def prepare(self, cfg: RunConfig) -> None:
        """See the base class: the text is there, and the knob takes the values."""
        if cfg.model.tp:
            raise ConfigError(
                "bench=coverage needs all heads in one process: leave out model.tp, or spread the "
                "layers with model.device_map=auto"
            )
        check_text(self.text)
        settings_of(cfg.method, self._values(METHODS.load(cfg.method["name"]).knob))

    def run(self, context: Context) -> None:
        """See the base class. One record per prompt and layer."""
        import torch

        from experiments.benches.needle import num_layers
        from pbs.patch.huggingface import apply_patch_with_prefill

        model = context.model
        assert model is not None
        self._check_fits(model)
        prompts = make_prompts(
            self.text,
            model,
            lengths=self.lengths,
            num_prompts=min(self.num_prompts, self.limit or self.num_prompts),
            seed=context.cfg.seed,
        )
        layers = self.layers or range(num_layers(model))
        context.announce(len(prompts) * len(layers))
        dense = build_method("flash")

        settings: dict[int, list[Setting]] = {}
        with apply_patch_with_prefill(model.model, dense), torch.inference_mode():

            def forward(prompt: Prompt, see: See) -> None:
                _forward(model, dense, prompt, layers, see)

            for prompt in prompts:
                wanted = {layer for layer in layers if _id(prompt, layer) not in context.done}
                if not wanted:
                    continue
                started = time.perf_counter()
                if prompt.length not in settings:
                    first = next(each for each in prompts if each.length == prompt.length)
                    settings[prompt.length] = self._settings(
                        context.cfg.method, lambda see, first=first: forward(first, see)
                    )
                own = settings[prompt.length]
                forward(prompt, self._recorder(context, prompt, own, wanted, started))

    def _settings(self, method: Mapping[str, Any], forward: Callable[[See], None]) -> list[Setting]:
        """What to measure: the own setting, and the values given, spread, or chosen on a prompt."""
        knob: Knob | None = METHODS.load(method["name"]).knob
        if knob is None or self.densities is None:
            return settings_of(method, self._values(knob))

        def measure(values: Sequence[float]) -> list[float]:
            settings = settings_of(method, values, targets=values)[1:]
            seen: list[list[float]] = []

            def see(call: CallRecord) -> None:
                if self.layers is None or call.layer_idx in self.layers:
                    heads = slice(None) if self.heads is None else self.heads
                    plans = [_plan(setting.method, call) for setting in settings]
                    seen.append([float(plan.density()[0, heads].mean()) for plan in plans])

            forward(see)
            return [sum(densities) / len(seen) for densities in zip(*seen, strict=True)]

        values = find_values(measure, knob, self.densities)
        return settings_of(method, values, targets=self.densities)

    def _values(self, knob: Knob | None) -> list[float]:
        """Of the knob, besides the own setting's."""
        if knob is None or self.densities is not None:
            return []
        if self.values is not None:
            return sorted(self.values)
        return spread_values(knob, self.num_values, longest=max(self.lengths))

    def _recorder(
        self,
        context: Context,
        prompt: Prompt,
        settings: Sequence[Setting],
        layers: set[int],
        started: float,
    ) -> See:
        """What measures these layers while the prompt runs through the model."""

        def measure(call: CallRecord) -> None:
            nonlocal started
            if call.layer_idx not in layers:
                return
            record = {
                "sample_id": _id(prompt, call.layer_idx),
                "prompt": prompt.name,
                "length": prompt.length,
                "input_digest": input_digest(prompt.ids),
                "is_truncated": prompt.is_truncated,
                **measure_call(call, settings, heads=self.heads, num_rows=self.num_rows),
                "seconds": time.perf_counter() - started,
            }
            context.add(record)
            started = time.perf_counter()

        return measure

    def summarise(self, records: Sequence[Record]) -> dict[str, Any]:
        """See the base class; density and coverage at the own setting, the curve beside them."""
        from experiments.benches.coverage.points import summarise_coverage

        return summarise_coverage(records)

    def _check_fits(self, model: LoadedModel) -> None:
        from experiments.benches.needle import num_layers

        if max(self.lengths) > model.max_length:
            raise ConfigError(
                f"bench.lengths has {max(self.lengths)}, the model takes {model.max_length} tokens "
                "at most; choose shorter lengths, or raise model.max_length if you know better"
            )
        config = model.model.config.get_text_config()
        for name, count in (
            ("layers", num_layers(model)),
            ("heads", config.num_attention_heads),
        ):
            chosen = getattr(self, name)
            if chosen is not None and max(chosen) >= count:
                raise ConfigError(
                    f"bench.{name} has {max(chosen)}, the model's are 0 to {count - 1}"
                )


def measure_call(
    call: CallRecord,
    settings: Sequence[Setting],
    *,
    heads: Sequence[int] | None,
    num_rows: int | None,
) -> Record:
    """Density and coverage of every setting for one call's queries and keys.

    Returns:
        The layer, the heads, the number of queries, and one point per setting with a list of
        densities and one of coverages, an entry per head.
    """
    from experiments.gate.coverage import measure_plans, sample_rows

    num_queries = call.q.shape[2]
    heads = list(range(call.q.shape[1])) if heads is None else heads
    rows = None
    if num_rows is not None and num_rows < num_queries:
        rows = sample_rows(num_queries, num_rows)
    plans = [_plan(setting.method, call) for setting in settings]
    coverage = measure_plans(call.q, call.k, plans, scale=call.scale, heads=heads, rows=rows)
    points = [
        {
            "value": setting.value,
            "is_own": setting.is_own,
            **({} if setting.target is None else {"target": setting.target}),
            "density": _rounded(plan.density()[0, heads]),
            "coverage": _rounded(covered[0]),
        }
        for setting, plan, covered in zip(settings, plans, coverage, strict=True)
    ]
    own = points[0]
    return {
        "layer": call.layer_idx,
        "heads": heads,
        "num_rows": num_queries if rows is None else len(rows),
        "num_tokens": call.k.shape[2],
        "points": points,
        "density": sum(own["density"]) / len(heads),
        "coverage": sum(own["coverage"]) / len(heads),
    }


def _forward(
    model: LoadedModel, dense: AttentionMethod, prompt: Prompt, layers: Sequence[int], see: See
) -> None:
    """Run a prompt through the model and show every layer's call.

    Raises:
        ConfigError: none of these layers asks a method.
    """
    called = set()

    def record(call: CallRecord) -> None:
        called.add(call.layer_idx)
        see(call)

    dense.recorder = record
    model.model(input_ids=prompt.ids, use_cache=False, logits_to_keep=1)
    if not called.intersection(layers):
        raise ConfigError(
            f"none of the layers {list(layers)} asks a method, only {sorted(called)} do: special "
            "layers, such as those with a sliding window, are the model's own"
        )


def _plan(method: AttentionMethod, call: CallRecord) -> AttentionPlan:
    """What the method computes, without the gathered keys, which are large."""
    if method.reason_to_run_dense(call.q, call.k):
        return call.plan
    plan = method.plan(call.q, call.k, scale=call.scale, layer_idx=call.layer_idx)
    return replace(plan, ordered_keys=None)


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def _id(prompt: Prompt, layer: int | None) -> str:
    return f"{prompt.name}-layer{layer}"
