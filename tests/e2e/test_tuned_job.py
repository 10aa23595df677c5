"""`fivefold tune` as a user runs it: real ranks, measured, and what is kept of them."""

from __future__ import annotations

from command import JOB, Fivefold

from orchestrator.run_folder import runs


def test_layouts_are_run_and_what_they_came_to_is_kept(fivefold: Fivefold) -> None:
    asked = ("tune", JOB, "layout.ep=null", "train.seed=7", "--trials", "2", "--steps", "3")
    answer = fivefold(*asked)
    assert answer.code == 0, answer.told
    measured = [each for each in answer.document["candidates"] if each["measured"]]
    assert measured
    assert {each["measured"]["outcome"] for each in measured} == {"ran"}
    folders = runs(fivefold.root)
    assert {run.run_id for run in folders} == {each["measured"]["run_id"] for each in measured}
    for run in folders:
        assert run.run_id.startswith("small-tune-")
        assert not run.names("checkpoints")
    for each in measured:
        low, high = each["step_seconds_interval"]
        assert low <= each["step_seconds"] <= high
    assert answer.document["command"].startswith(f"fivefold run {JOB} train.seed=7 layout.tp=2 ")
    again = fivefold.ask(*asked)
    assert again.code == 0
    assert len(runs(fivefold.root)) == len(folders)
    assert again.document["command"] == answer.document["command"]
