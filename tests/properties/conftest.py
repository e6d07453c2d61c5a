"""Equal draws in every run."""

import pytest
from hypothesis.internal.conjecture import providers


@pytest.fixture(autouse=True)
def _draws_do_not_depend_on_loaded_modules(monkeypatch):
    """Hypothesis also tries constants of the modules loaded so far: others in each selection."""
    constants = getattr(providers, "Constants", None)
    if constants is not None:  # older versions have none
        monkeypatch.setattr(providers, "_get_local_constants", constants)
        monkeypatch.setattr(providers, "CONSTANTS_CACHE", type(providers.CONSTANTS_CACHE)(1024))
