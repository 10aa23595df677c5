"""What keeps a machine's measuring going: parts that fail are told, and collectives have groups to run in."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from orchestrator.worker.profiling import links
from orchestrator.worker.profiling.__main__ import Parts


class FailingRanks:
    """Ranks on which one collective hangs and one is not there."""

    def run(self, world: int, function: Any, *args: Any, seconds: float) -> list[Any]:
        if function == "hangs":
            raise TimeoutError("ranks [1] did not finish in time")
        if function == "is not there":
            raise RuntimeError("rank 0 failed:\nTraceback ...\nRuntimeError: no such collective")
        return [function] * world


def test_a_part_that_fails_is_told_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    parts = Parts(FailingRanks(), time.monotonic() + 60)  # type: ignore[arg-type]
    for name in ("hangs", "is not there", "works"):
        parts.run(name, 2, name, 1.0)  # type: ignore[arg-type]
    Parts(FailingRanks(), time.monotonic()).run("late", 2, "works", 1.0)  # type: ignore[arg-type]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"failed": "hangs", "why": "ranks [1] did not finish in time"},
        {"failed": "is not there", "why": "RuntimeError: no such collective"},
        {"failed": "late", "why": "no time was left"},
    ]


@pytest.mark.parametrize(("world", "sizes"), [(2, (2,)), (3, (3,)), (4, (2, 4)), (6, (2, 6)), (8, (2, 4, 8))])
def test_groups_that_ranks_are_dealt_into_evenly(world: int, sizes: tuple[int, ...]) -> None:
    assert links.group_sizes(world) == sizes
