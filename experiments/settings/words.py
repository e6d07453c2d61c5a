"""What is wrong with the words of a command before anything is composed of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.settings.explain import GROUPS
from experiments.settings.groups import ConfigError

NO_SLURM = "Slurm, whose srun is not on this machine's PATH: run it on a node of the cluster"


def check_words(words: Sequence[str]) -> None:
    """Check what each word is about, and that no two choose for one group.

    Args:
        words: settings, without flags.

    Raises:
        ConfigError: a group that is null or given twice, Slurm without Slurm.
        OverrideParseException: a word that Hydra cannot read.
    """
    parser = OverridesParser.create()
    chosen = set()
    for word in words:
        (override,) = parser.parse_overrides([word])
        key = override.key_or_group
        if override.is_delete():
            continue
        is_group = key in GROUPS or key.startswith("hydra/")
        is_sweep = override.is_sweep_override()
        value = None if is_sweep else override.value()
        if is_group and not is_sweep and not isinstance(value, str | list | dict):
            got = "null" if value is None else value
            raise ConfigError(
                f"{key} must name one of its options, got {got}; leave it out, or remove it with "
                f"~{key}"
            )
        is_list = isinstance(value, list) and value and key != "experiment"
        # conf/config.yaml chooses for each group already: one more is not added.
        is_added = override.is_add() and key in GROUPS
        if is_group and (key in chosen or is_list or is_added):
            raise ConfigError(
                f"{key} is given more than once; choose one, or sweep with -m {key}=a,b"
            )
        chosen.add(key)
        if isinstance(value, str) and value == "submitit_slurm" and not shutil.which("srun"):
            raise ConfigError(
                f"{word} needs {NO_SLURM}, or choose hydra/launcher=submitit_local or joblib"
            )
