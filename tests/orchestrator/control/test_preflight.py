"""Who is suspect before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control import preflight
from orchestrator.worker.preflight import measure

SOUND = {"gflops": 50.0, "copied_gb_s": 9.0, "free_memory": 0.99, "written_mb_s": 400.0, "at": 1000.0}


def test_what_this_machine_does(tmp_path: Path) -> None:
    found = measure("cpu", tmp_path)
    assert set(found) == set(SOUND)
    assert all(value > 0 for value in found.values())
    assert list(tmp_path.iterdir()) == []
    assert "GFLOP/s" in preflight.text(found)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"gflops": 30.0}, "it computes at 60% of its peers' rate"),
        ({"copied_gb_s": 4.5}, "it copies in memory at 50% of its peers' rate"),
        ({"written_mb_s": 20.0}, "it writes to its disk at 5% of its peers' rate"),
        ({"free_memory": 0.4}, "60% of a device's memory is taken by something else"),
        ({"at": 1060.0}, "its clock is 60.0 s ahead"),
        ({"gflops": 40.0, "written_mb_s": 100.0, "at": 990.0}, None),
    ],
)
def test_a_node_is_held_against_its_peers(changes: dict[str, float], text: str | None) -> None:
    nodes = {"a": SOUND, "b": SOUND, "c": SOUND | changes}
    assert preflight.suspects(nodes, 1000.0) == ({"c": text} if text else {})


def test_of_two_nobody_can_say_which_is_slow() -> None:
    assert preflight.suspects({"a": SOUND, "b": SOUND | {"gflops": 10.0}}, 1000.0) == {}
