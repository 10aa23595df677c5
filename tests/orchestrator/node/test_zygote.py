"""The real zygote with real ranks that do not train: what their agent hears of them, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_runs import rank_launch

from orchestrator.messages import PACKET_BYTES
from orchestrator.pulse import new_page

HOST = Path(__file__).with_name("zygote_host.py")
ROOT = Path(__file__).parents[3]
SECONDS = 20.0
"""How long a test waits for what must come; a test that passes waits for nothing."""


class Agent:
    """An agent's end of a zygote, in a process of its own: one with threads, as this one has, must not fork."""

    def __init__(self, logs: Path, grace: float) -> None:
        self.logs = logs
        self.control, zygotes = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reports, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lock = os.open(logs / "lock", os.O_CREAT)
        inherited = (zygotes.fileno(), writing.fileno(), lock)
        subprocess.run(
            [sys.executable, HOST, "megatron", "cpu", str(grace), str(logs), *map(str, inherited)],
            pass_fds=inherited,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},  # as the agent gives its own
            check=True,
        )
        for descriptor in (zygotes.detach(), writing.detach(), lock):
            os.close(descriptor)
        for end in (self.control, self.reports):
            end.settimeout(SECONDS)
        self.pid = int(self.told()["pid"])
        self.zygote = os.pidfd_open(self.pid)
        self.ranks: dict[int, int] = {}
        """rank -> pidfd"""

    def send(self, launch_of: str, rank: int, attempt: int = 1, descriptors: tuple[int, ...] = ()) -> None:
        launch = rank_launch(launch_of, rank, attempt)
        log = self.logs / f"attempt-{attempt}" / f"rank-{rank}.log"
        message = {"kind": "fork", "launch": launch.model_dump(mode="json"), "log": str(log)}
        page = new_page()
        socket.send_fds(
            self.control, [json.dumps(message).encode()], [page, os.memfd_create("snapshots"), *descriptors]
        )
        os.close(page)

    def fork(self, launch_of: str, rank: int, attempt: int = 1) -> None:
        """Start a rank that stays, and wait until it is at work."""
        self.send(launch_of, rank, attempt)
        told = self.told()
        assert (told["kind"], told["rank"], told["attempt"]) == ("forked", rank, attempt)
        self.ranks[rank] = os.pidfd_open(told["pid"])
        assert self.report() == ("at_work", rank)

    def ended(self, launch_of: str, rank: int, attempt: int = 1) -> int:
        """Start a rank that ends by itself. Returns its exit code."""
        self.send(launch_of, rank, attempt)
        forked, ended = self.told(), self.told()
        assert self.report() == ("at_work", rank)
        assert (forked["kind"], ended["kind"]) == ("forked", "exited")
        assert {(told["rank"], told["attempt"]) for told in (forked, ended)} == {(rank, attempt)}
        return int(ended["code"])

    def told(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.control.recv(PACKET_BYTES))
        return message

    def report(self) -> tuple[str, int]:
        event = json.loads(self.reports.recv(PACKET_BYTES))
        return event["kind"], event["rank"]

    def exits(self, count: int) -> dict[int, int]:
        """The next `count` exits: codes by rank."""
        told = [self.told() for _ in range(count)]
        assert {each["kind"] for each in told} == {"exited"}
        return {each["rank"]: each["code"] for each in told}

    def signal(self, number: int) -> None:
        self.control.send(json.dumps({"kind": "signal", "signal": number}).encode())

    def wait_until_gone(self) -> None:
        for rank, watch in self.ranks.items():
            assert select.select([watch], [], [], SECONDS)[0], f"rank {rank} is still alive"
        assert select.select([self.zygote], [], [], SECONDS)[0], "the zygote is still alive"

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.zygote, signal.SIGKILL)
        self.wait_until_gone()
        for watch in (self.zygote, *self.ranks.values()):
            os.close(watch)
        for end in (self.control, self.reports):
            end.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    started: list[Agent] = []

    def start(grace: float = 60.0) -> Agent:
        started.append(Agent(tmp_path, grace))
        return started[-1]

    yield start
    for agent in started:
        agent.end()


def test_how_ranks_end_is_told_and_what_they_said_is_in_their_logs(start: Callable[..., Agent], tmp_path: Path) -> None:
    agent = start()
    for rank, (kind, code) in enumerate({"wrong": 3, "broken": 1, "aborted": -signal.SIGABRT}.items()):
        assert agent.ended(kind, rank, attempt=7) == code
        assert (tmp_path / "attempt-7" / f"rank-{rank}.log").read_text().startswith(f"rank {rank} is {kind}\n")
    assert "ValueError: a bug in a rank" in (tmp_path / "attempt-7" / "rank-1.log").read_text()
    # The zygote outlives them all, and signals reach those that are alive.
    for rank in (0, 1):
        agent.fork("patient", rank, attempt=8)
    agent.signal(signal.SIGTERM)
    assert {agent.report(), agent.report()} == {("left", 0), ("left", 1)}
    assert agent.exits(2) == {0: 75, 1: 75}
    for rank in (0, 1):
        agent.fork("patient", rank, attempt=9)
    agent.signal(signal.SIGKILL)
    assert agent.exits(2) == {0: -9, 1: -9}


def test_rank_0_is_handed_the_socket_of_the_store(start: Callable[..., Agent]) -> None:
    agent = start()
    with socket.create_server(("127.0.0.1", 0)) as store:
        agent.send("patient", 0, descriptors=(store.fileno(),))
        agent.ranks[0] = os.pidfd_open(pid := agent.told()["pid"])
        handed = json.loads(agent.reports.recv(PACKET_BYTES))["data"]["store"]
        assert os.readlink(f"/proc/{pid}/fd/{handed}") == os.readlink(f"/proc/self/fd/{store.fileno()}")
        # Nobody else holds it: a restart must find its port closed.
        zygotes = Path(f"/proc/{agent.pid}/fd")
        assert os.readlink(f"/proc/self/fd/{store.fileno()}") not in [os.readlink(entry) for entry in zygotes.iterdir()]


def test_ranks_whose_agent_is_gone_save_their_work_and_leave(start: Callable[..., Agent]) -> None:
    agent = start()
    assert agent.ended("wrong", 0) == 3
    for rank in (0, 1):  # the failure of an earlier attempt is forgotten
        agent.fork("patient", rank, attempt=2)
    agent.control.close()
    assert agent.report() == ("left", 1)  # and rank 0 is left the time that it takes
    assert agent.report() == ("left", 0)
    agent.wait_until_gone()


def test_an_agent_that_dies_before_it_has_read_everything_is_gone_too(start: Callable[..., Agent]) -> None:
    agent = start()
    agent.fork("patient", 0)
    agent.send("patient", 1)
    assert agent.report() == ("at_work", 1)
    agent.control.close()  # that rank 1 was forked stays unread, which resets the connection
    assert {agent.report(), agent.report()} == {("left", 0), ("left", 1)}
    agent.wait_until_gone()


def test_ranks_that_do_not_leave_are_ended_after_the_grace_period(start: Callable[..., Agent]) -> None:
    agent = start(grace=0.3)
    agent.fork("deaf", 0)
    began = time.monotonic()
    agent.control.close()
    agent.wait_until_gone()
    assert time.monotonic() - began >= 0.3
    agent.wait_until_gone()


def test_a_group_that_is_broken_has_nothing_to_save_and_is_ended_at_once(start: Callable[..., Agent]) -> None:
    agent = start(grace=60)
    agent.fork("deaf", 1)
    assert agent.ended("wrong", 0) == 3
    agent.control.close()
    agent.wait_until_gone()


def test_ranks_do_not_outlive_their_zygote(start: Callable[..., Agent]) -> None:
    agent = start()
    for rank in (0, 1):
        agent.fork("deaf", rank)
    signal.pidfd_send_signal(agent.zygote, signal.SIGKILL)
    agent.wait_until_gone()
