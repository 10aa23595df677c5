"""The controller's loop, stepped by hand: its machines are a script of what they tell, and a list of what was asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from sample_runs import job, make_checkpoint, metrics_line, step_report
from stage import Clock, Stage, Turn

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator import manifests
from orchestrator.control import controller as module
from orchestrator.control import record as record_module
from orchestrator.control.controller import cancel
from orchestrator.control.record import status_of
from orchestrator.messages import Event, Report, Stop
from orchestrator.run_folder import RunFolder
from parallel.planning.planner import device_of, plan_job, price, resolve

RANKS = range(4)


SetUp = Callable[..., Stage]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetUp:
    """`stage(turn, turn, ..., spec=...)`"""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)

    def set_up(*turns: Turn, spec: JobSpec | None = None) -> Stage:
        return Stage(str(tmp_path / "run-1"), clock, spec or job("train.steps=2"), *turns)

    return set_up


def resolved(spec: JobSpec) -> JobSpec:
    return resolve(spec, plan_job(spec).plans[0])


def started(attempt: int = 1, start_step: int = 0) -> list[Report]:
    pids = [
        Event(kind="rank_started", message="", attempt=attempt, rank=rank, data={"pid": 100 + rank}) for rank in RANKS
    ]
    data = {"start_step": start_step, "parameters": 1, "unigram_entropy": 3.0}
    return [*pids, Event(kind="training_started", message="", attempt=attempt, rank=0, data=data)]


def trained(*steps: int, attempt: int = 1) -> list[Report]:
    return [step_report(step, rank, attempt) for step in steps for rank in RANKS]


def exited(rank: int, code: int, attempt: int = 1) -> Event:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return Event(
        kind="rank_exited", message=f"rank {rank} {how}", attempt=attempt, rank=rank, data={"pid": 1, "code": code}
    )


def all_exited(code: int = 0, attempt: int = 1) -> list[Report]:
    return [exited(rank, code, attempt) for rank in RANKS]


def failed(rank: int, attempt: int = 1) -> Event:
    return Event(kind="rank_failed", message="RuntimeError: connection closed by peer", attempt=attempt, rank=rank)


def node_lost() -> Event:
    return Event(kind="node_lost", message="the agent of host-0 is gone", node="host-0")


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


# What is decided, beyond a restart.


def test_memory_that_ran_out_is_answered_by_a_layout_that_needs_less(stage: SetUp) -> None:
    spec = resolved(job("train.steps=2"))
    ran_out = Event(kind="rank_failed", message="OutOfMemoryError: CUDA out of memory", attempt=1, rank=3)
    play = stage([ran_out], [], [], started(attempt=2) + trained(1, 2, attempt=2) + all_exited(attempt=2), spec=spec)
    assert play.play().state == "done"
    before, after = (launches[0].job for launches in play.machines.launched)
    memory = [price(each, device_of(each)).memory.total for each in (before, after)]
    assert memory[1] <= 0.9 * memory[0]
    assert before.model_copy(update={"layout": after.layout}) == after
    assert RunFolder(play.run.place).read_json("job.json") == after.model_dump(mode="json")
    assert [event["data"]["layout"]["micro_batch"] for event in play.events if event["kind"] == "replanned"] == [
        after.layout.micro_batch
    ]


def test_a_node_that_does_not_come_back_is_gone_on_without(stage: SetUp) -> None:
    policy = ("policy.on_node_lost=replan", "policy.node_wait_seconds=5")
    spec = resolved(job("cluster.nodes=2", "cluster.devices_per_node=2", "train.steps=2", *policy))
    play = stage(started(), [node_lost()], [], spec=spec)
    play.machines.nodes = ["host-0", "host-1"]

    def lost() -> None:
        play.machines.grants, play.machines.nodes = [*[False] * 8, True], ["host-1"]

    two = [Event(kind="rank_started", message="", attempt=2, rank=rank, data={"pid": 7}) for rank in (0, 1)]
    steps = [step_report(step, rank, 2) for step in (1, 2) for rank in (0, 1)]
    play.machines.turns[2] = lost
    play.machines.turns.append([*two, *started(attempt=2)[4:], *steps, exited(0, 0, 2), exited(1, 0, 2)])
    assert play.play().state == "done"
    (again,) = play.machines.launched[1:]
    assert [(launch.rank, launch.local_rank) for launch in again] == [(0, 0), (1, 1)]
    assert again[0].job.cluster.nodes == 1
    assert again[0].job.train == spec.train
    assert status_of(play.run)["world"] == 2
    assert play.told("replanned")[0].endswith("1 of 2 nodes are left")


def test_a_node_that_was_to_blame_twice_is_left_for_another_where_there_is_one(stage: SetUp) -> None:
    def hung(attempt: int) -> Event:
        data = {"seconds": 5.3, "kind": "stopped"}
        return Event(kind="rank_hung", message="rank 1 hangs", attempt=attempt, rank=1, node="host-0", data=data)

    for others, calls in ((1, 0), (2, 1)):
        steps = [*trained(1, attempt=1), hung(1)], [*trained(2, attempt=2), hung(2)], trained(3, attempt=3)
        spec = job("train.steps=3")
        turns = [started(), steps[0], [], started(2), steps[1], [], started(3), [*steps[2], *all_exited(attempt=3)]]
        play = stage(*turns, spec=spec)
        play.machines.others = others
        play.run.remove("events.jsonl")
        play.run.remove("status.json")
        play = Stage(f"{play.run.place}-{others}", play.machines.clock, spec, *turns)
        play.machines.others = others
        assert play.play().state == "done"
        assert play.machines.calls.count("leave out host-0") == calls
        assert play.machines.calls.count("request") == 1 + calls
        assert len(play.told("node_quarantined")) == calls
        assert len(play.told("suspect_node")) == 1 - calls


def test_where_a_whole_node_waits_another_nodes_rank_is_to_blame(stage: SetUp) -> None:
    def hung(rank: int, node: str, kind: str) -> Event:
        data = {"seconds": 5.3, "kind": kind}
        return Event(kind="rank_hung", message=f"rank {rank} {kind}", attempt=1, rank=rank, node=node, data=data)

    spec = job("cluster.nodes=2", "cluster.devices_per_node=2", "train.steps=3", "policy.max_restarts=0")
    waits = [[hung(node, f"host-{node}", "waiting")] for node in (0, 1)]
    stopped = [hung(2, "host-1", "stopped")]
    for turns, reason in (
        ([waits[0], [], stopped, []], "rank 2 stopped"),  # who waits has patience
        ([waits[0], trained(1), waits[1], trained(2, 3) + all_exited()], "trained 3 steps"),  # each was over
        ([waits[0], waits[1], []], "rank 1 waiting"),  # nobody is to blame, and nobody moves
    ):
        play = stage(spec=spec)
        play = Stage(f"{play.run.place}-{reason[:6]}", play.machines.clock, spec, started(), *turns)
        play.machines.nodes = ["host-0", "host-1"]
        assert play.play().reason.startswith(reason)
        failed = [event["data"] for event in play.events if event["kind"] == "attempt_failed"]
        assert [each["failure"] for each in failed] == {
            "rank 2": ["rank_hung"],
            "traine": [],
            "rank 1": ["rank_waits"],
        }[reason[:6]]


def test_a_node_that_is_slow_before_the_run_is_left_for_another(stage: SetUp) -> None:
    sound = {"gflops": 50.0, "copied_gb_s": 9.0, "free_memory": 1.0, "written_mb_s": 400.0, "at": 0.0}
    spec = job("cluster.nodes=3", "cluster.devices_per_node=4", "train.steps=2")
    play = stage(started() + trained(1, 2) + all_exited(), spec=spec)
    play.machines.nodes, play.machines.others = ["a", "b", "c"], 4
    play.machines.checks = {"a": sound, "b": sound | {"gflops": 20.0}, "c": sound}
    assert play.play().state == "done"
    assert play.told("node_suspect")[0] == "b: it computes at 40% of its peers' rate"
    assert play.machines.calls[:7] == [
        *("connect", "request", "start_agents", "leave out b", "release"),
        *("request", "start_agents"),
    ]


def test_a_diverged_run_goes_back_behind_the_step_that_broke_it(stage: SetUp) -> None:
    def ruined(step: int, attempt: int) -> list[Report]:
        return [step_report(step, rank, attempt, loss=math.nan) for rank in RANKS]

    again = [started(2, 1) + trained(2, attempt=2), ruined(3, 2), []]
    play = stage(started(), trained(1, 2), ruined(3, 1), [], *again, spec=job("train.steps=4"))
    for step in (1, 2):
        make_checkpoint(play.run, step, job("train.steps=4"))
    assert play.play().reason.startswith("the loss has diverged since step 3: nan nats at step 3 (the same at step 3 ")
    assert [launches[0].checkpoint_steps for launches in play.machines.launched] == [(2, 1), (1,)]
    assert play.told("checkpoint_removed") == ["checkpoint at step 2 holds a diverged state"]
    assert play.machines.calls.count("forget from 2") == 2
    assert play.told("attempt_failed")[0].startswith("step 3: the loss has diverged since step 3")


def test_what_was_usual_outlives_a_controller(stage: SetUp) -> None:
    """Killed before it was sure: the next one does not take the ruined state for what is usual."""
    spec = job("train.steps=30", "policy.max_restarts=0")
    first = stage(spec=spec)
    first.run.append("metrics.jsonl", [metrics_line(step, loss=3.0 if step < 20 else 50.0) for step in range(1, 23)])
    for step in (18, 22):
        make_checkpoint(first.run, step, spec)
    ruined = [step_report(step, rank, loss=50.0) for step in range(23, 28) for rank in RANKS]
    play = stage(started(start_step=22), ruined, [], spec=spec)
    assert play.play().reason.startswith("the loss has diverged since step 23")
    assert manifests.steps(play.run) == [18]


def test_a_restart_that_got_nowhere_is_waited_for_and_can_be_cancelled(stage: SetUp) -> None:
    play = stage()
    thrice = [[exited(0, -9)], [], [exited(1, -9, 2)], [], [], [exited(2, -9, 3)], []]
    play.machines.turns = [*thrice, lambda: cancel(play.run)]
    assert play.play() == Stop(state="cancelled", reason="cancelled at step 0")
    assert [text.partition(", in ")[0] for text in play.told("restarting")] == [
        f"restart {number} of at most 3" for number in (1, 2, 3)
    ]
    assert ["in" in text for text in play.told("restarting")] == [False, True, True]
    assert play.machines.calls.count("launch") == 3


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


def test_a_slow_stage_is_given_fewer_layers_at_the_next_checkpoint(stage: SetUp) -> None:
    layout = ("layout.tp=1", "layout.dp=2", "layout.ep=2", "layout.pp=2", "layout.vpp=1", "layout.micro_batch=2")
    spec = job("model.layers=6", *layout, "train.steps=40", "policy.on_straggler=replan")

    def reports(step: int, attempt: int) -> list[Report]:
        slow = {"step_seconds": 0.9, "phase_seconds": {"data": 0.1, "compute": 0.8}}
        return [step_report(step, rank, attempt, **(slow if rank == 3 else {})) for rank in RANKS]

    def saved(step: int, attempt: int) -> Report:
        data = {"step": step, "seconds": 0.1}
        return Event(kind="checkpoint_written", message="", attempt=attempt, rank=0, data=data)

    first = [report for step in range(1, 21) for report in reports(step, 1)]
    second = [report for step in range(21, 41) for report in reports(step, 2)]
    again = [*second, saved(40, 2)], all_exited(attempt=2)
    play = stage(started() + first, [saved(20, 1)], started(2, 20), *again, spec=spec)
    assert play.play().state == "done"
    assert play.told("rank_slow")[0].startswith("rank 3 computes more slowly than its peers")
    assert play.told("replanned") == ["dp2 pp2 ep2 -> dp2 pp2 ep2 (4+2 layers), micro-batch 2: less for a slow stage"]
    assert [launches[0].job.layout.stage_layers for launches in play.machines.launched] == [None, (4, 2)]
