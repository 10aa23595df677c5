"""The controller's loop, stepped by hand: its machines are a script of what they tell, and a list of what was asked."""

from __future__ import annotations

import pytest
from sample_runs import job, make_checkpoint, step_report
from stage import RANKS, SetUp, Turn, all_exited, exited, failed, node_lost, started, trained

from jobs.errors import InputError
from orchestrator.control import controller as module
from orchestrator.control import record as record_module
from orchestrator.control.controller import cancel
from orchestrator.control.record import status_of
from orchestrator.messages import Event, Report, Stop

# The undisturbed run.


def test_a_run_that_nothing_happens_to(stage: SetUp) -> None:
    play = stage(started(), trained(1), trained(2), all_exited())
    assert play.play() == Stop(state="done", reason="trained 2 steps")
    assert play.machines.calls == ["connect", "request", "start_agents", "launch", "release"]
    assert play.trained == [(1, 1), (1, 2)]
    (launches,) = play.machines.launched
    assert [(launch.rank, launch.local_rank) for launch in launches] == [(rank, rank) for rank in RANKS]
    assert {(launch.store_address, launch.store_port) for launch in launches} == {("127.0.0.1", 29500)}
    assert {launch.checkpoint_steps for launch in launches} == {()}
    assert play.told("nodes_ready") == ["host-0 ready in 1.0 s"]
    assert play.events[-1]["kind"] == "run_done"
    assert play.run.read_json("ledger.json")["mark"] is None


def test_ranks_go_to_the_nodes_of_their_block(stage: SetUp) -> None:
    spec = job("cluster.nodes=2", "cluster.devices_per_node=2", "train.steps=2")
    play = stage(started() + trained(1, 2) + all_exited(), spec=spec)
    play.machines.nodes = ["host-0", "host-1"]
    play.play()
    assert [launch.local_rank for launch in play.machines.launched[0]] == [0, 1, 0, 1]
    assert [rank["node"] for rank in status_of(play.run)["ranks"]] == ["host-0", "host-0", "host-1", "host-1"]


def test_a_resumed_run_starts_from_its_checkpoints_and_tells_what_nobody_heard(stage: SetUp) -> None:
    play = stage(started(start_step=2) + trained(3) + all_exited(), spec=job("train.steps=3"))
    for step in (1, 2):
        make_checkpoint(play.run, step)
    play.play()
    assert play.machines.launched[0][0].checkpoint_steps == (2, 1)
    assert play.trained == [(1, 1), (1, 2), (1, 3)]


def test_a_run_whose_ranks_trained_it_to_its_end_unheard_is_done(stage: SetUp) -> None:
    play = stage()
    make_checkpoint(play.run, 2, reports=(step_report(1), step_report(2)))
    assert play.play() == Stop(state="done", reason="trained 2 steps")
    assert "launch" not in play.machines.calls
    assert play.trained == [(1, 1), (1, 2)]


# Waiting for devices.


@pytest.mark.parametrize("wait", ["granted", "prepare"])
def test_a_run_that_waits_is_known_to_be_alive(stage: SetUp, wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "_LOCAL_CONFIRM_SECONDS", 0.0)
    play = stage(started() + trained(1, 2) + all_exited())
    updated: list[float] = []

    def waiting(seconds: float) -> bool:
        updated.append(play.run.read_json("status.json")["updated_at"])
        return len(updated) == 3

    monkeypatch.setattr(play.machines, wait, waiting)
    play.play()
    assert len(updated) == 3
    assert updated == sorted(set(updated))


def test_devices_that_do_not_come_fail_the_run(stage: SetUp) -> None:
    play = stage(spec=job("policy.start_timeout_seconds=3"))
    play.machines.grants = [False]
    assert play.play() == Stop(state="failed", reason="no devices within 3 s")
    assert "launch" not in play.machines.calls


@pytest.mark.parametrize("wait", ["granted", "prepare"])
def test_a_run_that_waits_can_be_interrupted(stage: SetUp, wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play = stage()

    def interrupted(seconds: float) -> bool:
        play.controller.interrupt()
        return False

    monkeypatch.setattr(play.machines, wait, interrupted)
    assert play.play() == Stop(state="interrupted", reason="interrupted at step 0")
    assert "launch" not in play.machines.calls


# Failures.


def test_a_rank_that_dies_costs_an_attempt(stage: SetUp) -> None:
    play = stage()
    play.machines.turns = [
        started(),
        lambda: make_checkpoint(play.run, 1) and trained(1),
        [exited(2, -9)],
        [],  # what is told once the ranks are gone
        started(attempt=2, start_step=1),
        trained(2, attempt=2),
        all_exited(attempt=2),
    ]
    assert play.play().state == "done"
    assert play.machines.calls[3:] == ["launch", "kill_ranks", "launch", "release"]
    assert [launches[0].checkpoint_steps for launches in play.machines.launched] == [(), (1,)]
    assert [launches[0].attempt for launches in play.machines.launched] == [1, 2]
    assert play.trained == [(1, 1), (2, 2)]
    assert play.told("attempt_failed") == ["step 1: rank 2 was ended by signal 9"]
    assert play.told("restarting") == ["restart 1 of at most 3"]
    assert play.run.read_json("ledger.json")["totals"]["detect"] > 0


def test_a_spent_budget_fails_the_run(stage: SetUp) -> None:
    spec = job("policy.max_restarts=1")
    play = stage([exited(0, -11)], [], [exited(1, -9, attempt=2)], [], spec=spec)
    reason = "rank 1 was ended by signal 9 (2 failed attempts in 24 h, policy.max_restarts=1)"
    assert play.play() == Stop(state="failed", reason=reason)
    assert play.machines.calls[3:] == ["launch", "kill_ranks", "launch", "kill_ranks", "release"]


@pytest.mark.parametrize(
    "turns",
    [
        [[failed(0), failed(1), exited(2, -9)]],
        [[exited(2, -9), failed(0), exited(0, 1)]],
        [[failed(0)], [failed(1), exited(2, -9)]],
        [[exited(0, 1)], [failed(0), exited(2, -9)]],
    ],
)
def test_a_death_is_blamed_before_the_failures_that_it_leads_to(stage: SetUp, turns: list[Turn]) -> None:
    play = stage(*turns, [], spec=job("policy.max_restarts=0"))
    assert play.play().reason.startswith("rank 2 was ended by signal 9")


@pytest.mark.parametrize("turns", [[[failed(3), exited(3, 1)], []], [[exited(3, 1)], [failed(3)]]])
def test_a_failure_is_told_rather_than_the_exit_that_it_leads_to(stage: SetUp, turns: list[Turn]) -> None:
    play = stage(*turns, [], spec=job("policy.max_restarts=0"))
    assert play.play().reason.startswith("rank 3 failed: RuntimeError: connection closed by peer")


def test_an_exit_without_a_word_is_a_failure(stage: SetUp) -> None:
    play = stage([exited(3, 1)], [], [], spec=job("policy.max_restarts=0"))
    assert play.play().reason.startswith("rank 3 ended with code 1")


def test_ranks_that_are_killed_to_end_an_attempt_are_not_to_blame(stage: SetUp) -> None:
    play = stage([failed(3)], [], [exited(rank, -9) for rank in RANKS], spec=job("policy.max_restarts=0"))
    assert play.play().reason.startswith("rank 3 failed")
    assert [rank["state"] for rank in status_of(play.run)["ranks"]] == ["killed"] * 4


@pytest.mark.parametrize(
    "turns",
    [
        [[Event(kind="input_error", message="data.files=x: is empty", attempt=1, rank=0), exited(0, 2)], []],
        [[exited(0, 2)], [Event(kind="input_error", message="data.files=x: is empty", attempt=1, rank=0)], []],
        [[exited(1, -9)], [Event(kind="input_error", message="data.files=x: is empty", attempt=1, rank=0)]],
    ],
)
def test_the_users_input_stops_the_run_at_once(stage: SetUp, turns: list[Turn]) -> None:
    play = stage(*turns)
    assert play.play() == Stop(state="failed", reason="data.files=x: is empty")
    assert play.machines.calls.count("launch") == 1


@pytest.mark.parametrize(
    "turns",
    [
        [[node_lost()], []],
        [[Event(kind="zygote_lost", message="the zygote on host-0 died", node="host-0")], []],
        [[failed(0)], [node_lost()], []],
        [[exited(1, -9)], [node_lost()]],  # known to be gone only when it did not answer
    ],
)
def test_a_lost_node_is_replaced(stage: SetUp, turns: list[Turn]) -> None:
    play = stage(*turns, started(attempt=2) + trained(1, 2, attempt=2), all_exited(attempt=2))
    assert play.play().state == "done"
    assert play.machines.calls == [
        *("connect", "request", "start_agents", "launch", "kill_ranks", "drop host-0"),
        *("request", "start_agents", "launch", "release"),
    ]


def test_reports_of_an_attempt_that_is_over_are_ignored(stage: SetUp) -> None:
    late = [*trained(7), *all_exited(-9), failed(1)]
    play = stage([exited(0, -9)], [], late, started(attempt=2) + trained(1, 2, attempt=2), all_exited(attempt=2))
    assert play.play().state == "done"
    assert play.trained == [(2, 1), (2, 2)]


def test_a_fault_is_injected_once_a_run(stage: SetUp) -> None:
    injected = Event(kind="fault_injected", message="rank 1 kills itself", attempt=1, rank=1, data={"injection": 0})
    spec = job("train.steps=2", "fault.kill_rank=1")
    play = stage([injected, exited(1, -9)], [], started(attempt=2) + all_exited(attempt=2), spec=spec)
    play.play()
    assert [launches[0].injections for launches in play.machines.launched] == [(0,), ()]
    again = stage(started(attempt=3) + all_exited(attempt=3), spec=spec)  # a later session of the run
    again.play()
    assert [launches[0].injections for launches in again.machines.launched] == [()]


def test_a_controller_that_fails_says_so_and_gives_the_nodes_back(stage: SetUp) -> None:
    def breaks() -> list[Report]:
        raise RuntimeError("the wire is cut")

    play = stage(started(), breaks)
    with pytest.raises(RuntimeError):
        play.controller.run()
    assert play.machines.calls[-1] == "release"
    status = status_of(play.run)
    assert (status["state"], status["reason"]) == ("failed", "the controller failed: RuntimeError: the wire is cut")


def test_a_checkpoint_of_another_model_ends_the_run_in_its_own_words(stage: SetUp) -> None:
    play = stage()
    make_checkpoint(play.run, 1, job("model.layers=8"))
    with pytest.raises(InputError) as caught:
        play.controller.run()
    assert "launch" not in play.machines.calls
    assert play.machines.calls[-1] == "release"
    status = status_of(play.run)
    assert (status["state"], status["reason"]) == ("failed", str(caught.value))
    assert [event["kind"] for event in play.events].count("run_failed") == 1


# Stopping.


def test_an_interrupt_asks_the_ranks_to_leave(stage: SetUp) -> None:
    play = stage()
    play.machines.turns = [started(), trained(1), lambda: play.controller.interrupt(), all_exited(75)]
    assert play.play() == Stop(state="interrupted", reason="interrupted at step 1")
    assert play.machines.calls[4:] == ["ask_to_stop", "release"]
    assert [rank["state"] for rank in status_of(play.run)["ranks"]] == ["left"] * 4


def test_a_second_interrupt_ends_the_ranks(stage: SetUp) -> None:
    play = stage()
    play.machines.turns = [started(), lambda: play.controller.interrupt(), [], lambda: play.controller.interrupt()]
    assert play.play().state == "interrupted"
    assert play.machines.calls[4:] == ["ask_to_stop", "kill_ranks", "release"]


def test_ranks_that_do_not_leave_in_time_are_ended(stage: SetUp) -> None:
    play = stage(spec=job("policy.grace_seconds=2.5"))
    play.machines.turns = [started(), lambda: play.controller.interrupt(), [exited(0, 75)], [], []]
    assert play.play().state == "interrupted"
    assert play.machines.calls[4:] == ["ask_to_stop", "kill_ranks", "release"]


def test_a_rank_that_dies_while_it_should_leave_does_not_start_another_attempt(stage: SetUp) -> None:
    play = stage()
    play.machines.turns = [started(), lambda: play.controller.interrupt(), [exited(0, -9)]]
    assert play.play().state == "interrupted"
    assert play.machines.calls[4:] == ["ask_to_stop", "kill_ranks", "release"]


def test_a_run_that_reaches_its_last_step_is_done_though_it_was_to_stop(stage: SetUp) -> None:
    play = stage()
    play.machines.turns = [started(), lambda: play.controller.interrupt(), trained(1, 2) + all_exited(0)]
    assert play.play() == Stop(state="done", reason="trained 2 steps")


def test_a_request_to_cancel_is_found_in_the_run_folder_and_taken_away(stage: SetUp) -> None:
    play = stage()
    play.machines.turns = [started(), lambda: cancel(play.run), all_exited(75)]
    assert play.play() == Stop(state="cancelled", reason="cancelled at step 0")
    assert not play.run.exists(module.CANCEL_REQUEST)
    assert play.told("stopping") == ["cancelled at step 0: writing a checkpoint, then leaving"]


def test_ranks_that_were_asked_from_outside_are_begun_again_for_nothing(stage: SetUp) -> None:
    spec = job("train.steps=2", "policy.max_restarts=0")
    again = [started(attempt=2, start_step=1), trained(2, attempt=2) + all_exited(attempt=2)]
    play = stage(started(), trained(1), all_exited(75), [], *again, spec=spec)
    assert play.play() == Stop(state="done", reason="trained 2 steps")
    assert play.told("restarting") == ["restart 0 of at most 0"]
