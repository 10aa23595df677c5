"""A node agent over a real zygote whose ranks do not train: what its controller hears, and the lock on the machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from sample_runs import job, rank_launch

from orchestrator.messages import Report
from orchestrator.node import agent as module
from orchestrator.node.agent import NodeAgent

HOST = Path(__file__).with_name("zygote_host.py")
SECONDS = 20.0
NODE = f"{socket.gethostname()}-0"

MakeAgent = Callable[..., NodeAgent]


@pytest.fixture
def make_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeAgent]:
    """`make_agent(session, place=...)`: an agent whose zygote's ranks are those of zygote_host.py."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {HOST} "$@"\n')  # in place of `-m` and its module
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_own_address", lambda: "127.0.0.1")  # as Ray says it is
    monkeypatch.setattr(module, "_own_id", lambda: "its id")
    made: list[NodeAgent] = []

    def make(session: str = "one", place: str | None = None) -> NodeAgent:
        made.append(NodeAgent(place or str(tmp_path / "run-1"), 0, session, job().model_dump(mode="json")))
        return made[-1]

    yield make
    for agent in made:
        if hasattr(agent, "_zygote"):
            agent._zygote.shutdown(socket.SHUT_RDWR)


def launch(what: str, *ranks: int, attempt: int = 1) -> list[dict[str, Any]]:
    return [rank_launch(what, rank, attempt).model_dump(mode="json") for rank in ranks]


def hear(agent: NodeAgent, *kinds: str) -> list[Any]:
    """Poll until these have been told, in any order."""
    heard: list[Report] = []
    deadline = time.monotonic() + SECONDS
    while len(heard) < len(kinds) and time.monotonic() < deadline:
        heard += agent.poll(1.0)
    assert sorted(getattr(report, "kind", report.type) for report in heard) == sorted(kinds)
    return heard


def test_what_ranks_say_and_how_they_end_comes_through_poll(make_agent: MakeAgent) -> None:
    agent = make_agent()
    assert agent.prepare() == (NODE, "its id", {"gflops": 1.0})
    agent.open_store()
    agent.launch(launch("wrong", 0))
    events = {event.kind: event for event in hear(agent, "rank_started", "at_work", "rank_exited")}
    assert {(event.rank, event.node, event.attempt) for event in events.values()} == {(0, NODE, 1)}
    pid = events["rank_started"].data["pid"]
    assert events["rank_started"].message == f"rank 0 started as pid {pid} on {NODE}"
    assert events["rank_exited"].message == "rank 0 ended with code 3"
    assert events["rank_exited"].data == {"pid": pid, "code": 3}
    assert agent.poll(0.0) == []
    agent.launch(launch("diverged", 1, attempt=2))
    (report,) = (told for told in hear(agent, "rank_started", "at_work", "step") if told.type == "step")
    assert report.loss != report.loss
    agent.kill()
    (exited,) = hear(agent, "rank_exited")
    assert (exited.message, exited.attempt) == ("rank 1 was ended by SIGKILL", 2)


def test_ranks_are_asked_to_leave_and_killing_waits_until_they_are_gone(make_agent: MakeAgent) -> None:
    agent = make_agent()
    agent.prepare()
    agent.open_store()
    agent.launch(launch("patient", 0, 1))
    hear(agent, *["rank_started", "at_work"] * 2)
    agent.ask_to_stop()
    told = hear(agent, *["left", "rank_exited"] * 2)
    assert {event.data["code"] for event in told if event.kind == "rank_exited"} == {75}
    agent.open_store()
    agent.launch(launch("deaf", 0, 1, attempt=2))
    pids = [event.data["pid"] for event in hear(agent, *["rank_started", "at_work"] * 2) if event.kind != "at_work"]
    agent.kill()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    agent.kill()  # with none left there is nothing to wait for


@pytest.mark.parametrize("unread", [False, True])
def test_a_zygote_that_dies_is_told(make_agent: MakeAgent, unread: bool) -> None:
    agent = make_agent()
    agent.prepare()
    agent.launch(launch("deaf", 1))
    hear(agent, "rank_started", "at_work")
    zygote = _parent(agent._live[1])
    os.kill(zygote, signal.SIGSTOP)
    if unread:
        agent.ask_to_stop()
    os.kill(zygote, signal.SIGKILL)
    (event,) = hear(agent, "zygote_lost")
    assert event.node == NODE


def _parent(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("PPid:")]
    return int(line.split()[1])


def test_the_address_of_the_store_is_taken_until_rank_0_serves_it(make_agent: MakeAgent) -> None:
    agent = make_agent()
    address, port = agent.open_store()
    with pytest.raises(OSError, match="in use"):
        socket.create_server((address, port))
    assert agent.open_store() != (address, port)


def test_logs_are_uploaded_where_the_run_folder_is_elsewhere(make_agent: MakeAgent) -> None:
    agent = make_agent(place="memory://agents-logs/run-1")
    agent.prepare()
    agent.launch(launch("wrong", 1, attempt=3))
    hear(agent, "rank_started", "at_work", "rank_exited")
    agent.close()
    memory = fsspec.filesystem("memory")
    assert memory.cat_file("/agents-logs/run-1/logs/attempt-3/rank-1.log") == b"rank 1 is wrong\n"
    memory.rm("/agents-logs", recursive=True)


# The lock.


def test_a_session_waits_for_the_processes_of_the_one_before(make_agent: MakeAgent) -> None:
    held = make_agent("one")._lock_machine(0)
    holder = subprocess.Popen(["sleep", "60"], pass_fds=[held])  # as a rank that has lost its controller
    os.close(held)
    later = make_agent("two")
    with pytest.raises(RuntimeError, match="ranks of an earlier session of this run are still alive"):
        later._lock_machine(0.05)
    other_run = make_agent("two", place="memory://another-run")
    os.close(other_run._lock_machine(0))
    holder.kill()
    holder.wait()
    os.close(later._lock_machine(0))


def test_agents_of_one_session_share_a_machine(make_agent: MakeAgent, tmp_path: Path) -> None:
    os.close(make_agent("one")._lock_machine(0))  # its lock is free, and is taken away
    first = make_agent("two")._lock_machine(0)
    second = NodeAgent(str(tmp_path / "run-1"), 1, "two", job().model_dump(mode="json"))._lock_machine(0)
    folder = tmp_path / f"fivefold-{os.getuid()}" / "run-1"
    assert sorted(lock.name[:3] for lock in folder.iterdir()) == ["two", "two"]
    for held in (first, second):
        os.close(held)


def test_a_lock_that_another_agent_has_just_removed_is_free(tmp_path: Path) -> None:
    module._wait_until_free(tmp_path / "gone.lock", deadline=0.0)
