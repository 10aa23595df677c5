"""A run from its spec to its summary, with nothing in its way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import INTERVAL, STEPS, Answer, Fivefold, kinds, metrics

from orchestrator.run_folder import RunFolder
from parallel.layout import Layout


@pytest.fixture(scope="module")
def run(undisturbed: tuple[Fivefold, Answer]) -> RunFolder:
    return RunFolder(undisturbed[1].document["run_folder"])


def test_it_ends_done_and_leaves_no_process(undisturbed: tuple[Fivefold, Answer], run: RunFolder) -> None:
    fivefold, answer = undisturbed
    assert answer.code == 0, answer.told
    assert answer.document["run_id"] == run.run_id
    assert (answer.document["state"], answer.document["step"], answer.document["attempts"]) == ("done", STEPS, 1)
    assert fivefold.survivors(5) == []
    assert kinds(run)[-1] == "run_done"


def test_metrics_have_a_line_a_step_and_the_loss_falls(run: RunFolder) -> None:
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["attempt"] == 1
        assert line["tokens"] == 8 * 64
        assert line["step_seconds"] > 0
        assert line["grad_norm"] > 0
    assert lines[-1]["loss"] < lines[0]["loss"] - 1


def test_the_ledger_sums_to_wall_time(run: RunFolder) -> None:
    ledger, status = run.read_json("ledger.json"), run.read_json("status.json")
    wall = status["updated_at"] - status["created_at"]
    assert sum(ledger["totals"].values()) == pytest.approx(wall, rel=0.01)
    trained = sum(line["step_seconds"] for line in metrics(run))
    assert trained * 0.8 < ledger["totals"]["productive"] < wall
    assert ledger["totals"]["rework"] == ledger["totals"]["detect"] == 0


def test_status_tells_of_every_rank(undisturbed: tuple[Fivefold, Answer], run: RunFolder) -> None:
    fivefold, _ = undisturbed
    answer = fivefold.ask("status", run.run_id)
    status = answer.document
    assert (answer.code, status["state"], status["attempt"], status["step"]) == (0, "done", 1, STEPS)
    assert status["layout"] == Layout(tp=2, dp=2, ep=2).as_dict()
    assert [rank["rank"] for rank in status["ranks"]] == [0, 1, 2, 3]
    assert len({rank["pid"] for rank in status["ranks"]}) == 4
    assert {(rank["state"], rank["step"]) for rank in status["ranks"]} == {("done", STEPS)}
    assert all(rank["node"] for rank in status["ranks"])


def test_checkpoints_are_whole_and_the_newest_are_kept(undisturbed: tuple[Fivefold, Answer], run: RunFolder) -> None:
    fivefold, _ = undisturbed
    answer = fivefold.ask("checkpoint", "verify", "last")
    assert answer.code == 0
    assert [each["step"] for each in answer.document["checkpoints"]] == [STEPS - i * INTERVAL for i in range(3)]
    assert all(each["whole"] and each["files"] > 4 for each in answer.document["checkpoints"])


def test_the_peak_is_told_before_the_first_step_and_held_against_it(run: RunFolder) -> None:
    assert [kind for kind in kinds(run) if kind.startswith("memory")] == ["memory_planned", "memory_checked"]
    memory = run.read_json("memory.json")
    # 64 tokens are rehearsed by 4 to 16, whose routing is not theirs; tests/orchestrator/worker has longer ones.
    assert memory["predicted_bytes"] == pytest.approx(memory["measured_bytes"], rel=0.3)
    assert run.read("memory.png").startswith(b"\x89PNG")


def test_the_folder_reads_with_a_text_editor(undisturbed: tuple[Fivefold, Answer], run: RunFolder) -> None:
    fivefold, answer = undisturbed
    folder = Path(run.place)
    assert json.loads((folder / "job.json").read_text())["layout"]["micro_batch"] is not None
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert answer.document["loss_plot"] == str(folder / "loss.png")
    assert sorted(path.name for path in (folder / "logs/attempt-1").iterdir()) == [f"rank-{r}.log" for r in range(4)]
    assert str(STEPS) in answer.told.split("done: trained")[0].splitlines()[-2]
    assert fivefold.ask("list").document["runs"][0]["run_id"] == run.run_id
