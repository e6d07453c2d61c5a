"""The environments that samples were made in, told apart by a short id. Quick to import."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.store import Record

# What can change a number. Without a digest of the source, as in older files, the commit stands
# for it. The time, the number of processors and of GPUs that are there change nothing.
PARTS = (
    *("python", "platform", "packages", "num_threads", "device", "driver", "cuda"),
    *("launch_options", "crossover", "variables"),
)
SOURCE, COMMIT = ("source",), ("commit", "is_dirty")
AGAIN = "resume=false measures again"


def environment_id(environment: Mapping[str, Any]) -> str:
    """Short name of the parts of an ``env.json`` that can change a result, 8 digits."""
    text = json.dumps(_parts(environment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _parts(environment: Mapping[str, Any]) -> dict[str, Any]:
    source = SOURCE if environment.get("source") else COMMIT
    return {key: environment[key] for key in (*PARTS, *source) if key in environment}


def environments_in(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """All environments of an ``env.json`` by their ids, the latest first.

    Args:
        content: of the file. Those from before samples named their environment have at most one
            earlier one, under "resumed_from".
    """
    if not content:
        return {}
    others = ("earlier", "resumed_from")
    latest = {key: value for key, value in content.items() if key not in others}
    found = {environment_id(latest): latest, **content.get("earlier", {})}
    return {**found, **environments_in(content.get("resumed_from") or {})}


def add_environment(
    content: Mapping[str, Any], environment: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The content of an ``env.json`` with one more environment, which becomes the latest.

    One that is there already stays as it was first noted.
    """
    known = environments_in(content)
    own = environment_id(environment)
    if own in known and next(iter(known)) == own:
        return content
    latest = known.pop(own, environment)
    return {**latest, "earlier": known} if known else latest


def differing_parts(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The parts in which two environments differ, such as "num_threads" or "packages.torch"."""
    found = []
    left, right = _parts(ours), _parts(theirs)
    for key in sorted(left.keys() | right.keys()):
        mine, other = left.get(key), right.get(key)
        if mine == other:
            continue
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            names = sorted(mine.keys() | other.keys())
            found += [f"{key}.{name}" for name in names if mine.get(name) != other.get(name)]
        else:
            found.append(key)
    return found


def environments_of(records: Iterable[Record]) -> dict[str, int]:
    """How many of the samples come from each environment; older ones from one without a name."""
    return dict(Counter(str(record.get("environment") or "unnamed") for record in records))


def prefill_times(records: Sequence[Record]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of the times to the first token.

    Times of two environments (other code, packages, threads or device) have no common median: all
    three are None then, and ``no_time`` says why.
    """
    from experiments.statistics import quantiles

    names = ("prefill_seconds", "prefill_p20", "prefill_p80")
    num_environments = len(environments_of(records))
    if num_environments > 1:
        reason = f"{len(records)} samples were timed in {num_environments} environments; {AGAIN}"
        return {**dict.fromkeys(names), "no_time": reason}
    times = quantiles([record["prefill_seconds"] for record in records])
    return dict(zip(names, (times.median, times.p20, times.p80), strict=True))
