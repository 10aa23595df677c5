from __future__ import annotations

import pytest

from orchestrator.worker.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return Ranks()
