"""Commands that can be killed, and what is compared after they were."""

import pytest

from tests.experiments.conftest import (  # noqa: F401 - fixtures of cells in this process
    _configs_registered,
    _no_maps,
    command,
    compose_cell,
    project,
    run,
)
from tests.reliability.commands import Server


@pytest.fixture(scope="session")
def server():
    """Starts commands in milliseconds."""
    with Server() as server:
        yield server
