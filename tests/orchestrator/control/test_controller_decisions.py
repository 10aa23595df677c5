"""What the controller decides beyond a restart: another layout, another node, a step before, fewer layers, patience."""

from __future__ import annotations

import math

from sample_runs import job, make_checkpoint, metrics_line, step_report
from stage import RANKS, SetUp, Stage, all_exited, exited, node_lost, resolved, started, trained

from orchestrator import manifests
from orchestrator.control.controller import cancel
from orchestrator.control.record import status_of
from orchestrator.messages import Event, Report, Stop
from orchestrator.run_folder import RunFolder
from parallel.planning.planner import device_of, price


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
