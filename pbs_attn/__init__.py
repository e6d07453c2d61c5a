"""The name of the original package: ``pbs_attn`` is ``pbs``, and so are all its submodules.

``import pbs_attn.patch.huggingface`` gives the very module that ``import pbs.patch.huggingface``
gives; nothing is loaded twice. A finder answers every ``pbs_attn.<name>`` with ``pbs.<name>``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType

from typing_extensions import override

ALIAS, REAL = "pbs_attn", "pbs"


class AliasLoader(Loader):
    """Puts the real module in the place of the one the import system made."""

    def exec_module(self, module: ModuleType) -> None:
        """Import the real module under its own name and enter it under the alias too."""
        sys.modules[module.__name__] = import_module(_real_name(module.__name__))


class AliasFinder(MetaPathFinder):
    """Finds ``pbs_attn.<name>`` wherever ``pbs.<name>`` exists."""

    @override
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """A spec for the alias, or None for names of other packages and missing modules."""
        if not fullname.startswith(f"{ALIAS}.") or find_spec(_real_name(fullname)) is None:
            return None
        return spec_from_loader(fullname, AliasLoader())


def _real_name(alias: str) -> str:
    return REAL + alias.removeprefix(ALIAS)


sys.meta_path.insert(0, AliasFinder())
sys.modules[ALIAS] = import_module(REAL)
