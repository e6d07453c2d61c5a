"""What a user got wrong on the command line, in one line: the setting, what it may be, the nearest.

Hydra and OmegaConf say it in their own terms, over several lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from experiments.settings.checks import describe_type, shorten
from experiments.settings.groups import ConfigError

GROUPS = (
    "model",
    "method",
    "order",
    "selector",
    "bench",
    "match",
    "runner",
    "logger",
    "experiment",
    "debug",
    "paths",
)


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """See :func:`pbs.registry.unknown`; ``import pbs`` takes the seconds that torch takes."""
    from pbs.registry import unknown

    return unknown(kind, shorten(name)[1:-1], valid)


def explain(error: Exception) -> str:
    """What is wrong with a setting, what is valid, and what is nearest."""
    text = str(error)
    if isinstance(error, ConfigError):
        return text
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        said = unknown(f"option of group {group!r}:", option.removesuffix(".yaml"), error.options)
        return f"{said}{_PACKAGES if group == 'hydra/launcher' else ''}"
    if isinstance(error, OverrideParseException):
        return _explain_word(error)
    for find, say in _PHRASES:
        found = re.search(find, text, re.DOTALL)
        if found:
            return say(found)
    file = re.match(r"In '([^']+)'", text)
    if file and isinstance(error.__context__, OmegaConfBaseException):
        return f"{file[1]}.yaml: {_explain_setting(error.__context__)}"
    cause = error.__cause__ or error
    if isinstance(cause, OmegaConfBaseException):
        return _explain_setting(cause)
    if isinstance(error, OSError):
        from experiments.settings.failures import explain_failure

        return f"{explain_failure(error)}; results go to the folder paths.outputs=DIR"
    if isinstance(error, ValueError):
        return text
    first = text.splitlines()[0] if text else "no message"
    # Errors of Hydra and its launcher are sentences; anything else was not meant for a user.
    if type(error).__module__.startswith(("hydra.", "submitit.")):
        return first
    return f"internal error, {type(error).__name__}: {first} (HYDRA_FULL_ERROR=1 shows where)"


def _explain_setting(cause: OmegaConfBaseException) -> str:
    """A key that does not exist, or a value of the wrong type."""
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.key is not None:
        return _explain_key(cause)
    key = re.sub(r"\[\d+\]$", "", cause.full_key or "")
    first = str(cause).splitlines()[0]
    hint = _expected(cause)
    if not key or isinstance(cause, InterpolationResolutionError):
        return f"{key}: {first}" if key else first
    if "does not support deletion" in first:
        return f"{key} cannot be taken away; give it a value with {key}=..."
    if hint is None:
        return f"{key}: {first}"
    is_known = "merge" not in first
    got = f", got {shorten(cause.value)}" if is_known else ""
    return f"{key} must be {describe_type(hint)}{got}"


def _explain_key(cause: OmegaConfBaseException) -> str:
    parent, _, key = str(cause.full_key or cause.key).rpartition(".")
    node = cause.parent_node
    valid = [str(name) for name in node] if isinstance(node, DictConfig) else []
    if not parent and key in GROUPS:
        return f"{key} has no settings of its own; choose one of its options with {key}=OPTION"
    if not parent:
        valid = sorted({*GROUPS, *valid} - {"hydra"})
    where = f" of {parent!r}" if parent else " or group"
    if isinstance(node, DictConfig) and OmegaConf.select(node, "name"):
        where += f" ({node.name})"
    return unknown(f"key{where}:", key, valid)


def _expected(cause: OmegaConfBaseException) -> Any:
    """The type of the field that a value was meant for; None if nothing says it."""
    owner = cause.object_type
    if is_dataclass(owner) and cause.key in {entry.name for entry in fields(owner)}:
        return get_type_hints(owner)[cause.key]
    return None if cause.ref_type in (None, Any) else cause.ref_type


def _explain_word(error: OverrideParseException) -> str:
    word = shorten(error.override)
    return (
        f"cannot read {word}: expected GROUP=OPTION or GROUP.KEY=VALUE; a quote or a bracket is "
        "missing, or the value needs quotes, as in \"KEY='VALUE'\""
    )


def _say_group(found: re.Match[str]) -> str:
    return unknown("key or group:", found[1], GROUPS)


def _say_part(found: re.Match[str]) -> str:
    group, option, method = found.groups()
    return f"{method} has no {group}: leave out {group}={option}, or choose a method with one"


_PACKAGES = "; others come with the packages hydra-joblib-launcher and hydra-submitit-launcher"
_PHRASES = (
    (r"In '(order|selector)/(\w+)'.*object_type=(\w+)", _say_part),
    (r"Could not override '([^']*)'\.\s+(?:No match|Did you mean)", _say_group),
    (
        r"Ambiguous value for argument '(.*?)'",
        lambda found: (
            f"{found[1]} has several values: add -m (--multirun) to sweep over them, or write a "
            "list as KEY=[a,b]"
        ),
    ),
    (
        r"Sweep parameters (.*?) requires --multirun",
        lambda found: f"{found[1]} has several values: add -m (--multirun) to sweep over them",
    ),
    (
        r"Unexpected type for root: NoneType",
        lambda _: "match has no settings yet: choose match=density or match=coverage as well",
    ),
    (
        r"invalid literal for int\(\) with base 10: '(.*?)'",
        lambda found: f"a list has no entry {found[1]!r}: give the whole list as KEY=[a,b]",
    ),
)
