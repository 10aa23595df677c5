from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import Case, subset
from matrix import Matrix, Outcome, Result

from orchestrator.worker.ranks import Ranks


@pytest.fixture(scope="session")
def outcome(ranks: Ranks, request: pytest.FixtureRequest) -> Iterator[Outcome]:
    """The result of a case. Those of the subset that were collected start at once, and run side by side."""
    matrix = Matrix(ranks)
    collected = {item.name for item in request.session.items}
    started = matrix.start(case for case in subset() if any(f"[{case.name}]" in name for name in collected))

    def result(case: Case) -> Result:
        if case.name not in started:
            started.update(matrix.start([case]))
        return started[case.name].result(timeout=170)

    yield result
    matrix.stop()
