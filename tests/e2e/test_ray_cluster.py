"""A Ray cluster of three nodes, all on this machine, and a job of two that is handed to it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command import JOB, STEPS, Fivefold, Opened, assert_same_curve, kill_rank, kinds, metrics, reached, until
from command import seconds_to_next_step as recovery

from orchestrator.run_folder import RunFolder

TWO_NODES = ("cluster.nodes=2", "cluster.devices_per_node=2")
LONG_VALIDATIONS = ("train.eval_interval=1", "train.eval_batches=20")
"""They change nothing of the training; ranks that lose their controller notice it before the last step."""
KEPT_IN_MEMORY = ("checkpoint.interval=100", "checkpoint.snapshot_interval=1")
NODE_MARK = "FIVEFOLD_E2E_NODE"


@pytest.fixture
def cluster(opened: Opened) -> Iterator[Fivefold]:
    """`fivefold` with RAY_ADDRESS set to a cluster that asks for its token."""
    port, *others = free_ports(6)
    address = f"127.0.0.1:{port}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with opened(RAY_ADDRESS=address, **token) as fivefold, ExitStack() as nodes:
        head = [f"--port={port}", f"--dashboard-port={others[0]}", f"--ray-client-server-port={others[1]}"]
        start_node(fivefold, nodes, "head", "--head", *head, f"--dashboard-agent-listen-port={others[2]}")
        until(lambda: answers(port) and answers(others[0]), 60, "head node")
        for name, listens in (("second", others[3]), ("third", others[4])):
            start_node(fivefold, nodes, name, f"--address={address}", f"--dashboard-agent-listen-port={listens}")
            until(partial(answers, listens), 60, f"{name} node")  # two at once fail over the ports they choose
        yield fivefold


def start_node(fivefold: Fivefold, nodes: ExitStack, name: str, *options: str) -> None:
    """All that comes of it has its name in the environment."""
    ray = str(Path(sys.executable).with_name("ray"))
    common = ("--num-cpus=2", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0")
    environment = {key: text for key, text in fivefold.environment.items() if key != "RAY_ADDRESS"}
    environment[NODE_MARK] = name
    with (fivefold.folder / "ray.out").open("ab") as output:
        node = subprocess.Popen(
            [ray, "start", "--block", "--disable-usage-stats", *common, *options],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    nodes.callback(node.wait, 60)
    nodes.callback(node.terminate)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def node_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(each.decode().partition("=")[2] for each in variables if each.startswith(NODE_MARK.encode()))


def kill_node(name: str) -> float:
    """All of its processes at once, as when its power fails. Returns when."""
    at = time.time()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, StopIteration):
            if node_of(int(process.name)) == name:
                os.kill(int(process.name), signal.SIGKILL)
    return at


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_ranks_on_two_nodes_outlive_a_rank_and_a_node_and_the_run_its_controller(
    cluster: Fivefold, reference: dict[int, tuple[float, float]]
) -> None:
    too_many = ("submit", JOB, "cluster.nodes=4", "cluster.devices_per_node=1")
    until(lambda: "of the 3 at" in cluster(*too_many).told, 60, "all nodes")
    answer = cluster("submit", JOB, *TWO_NODES, *LONG_VALIDATIONS, *KEPT_IN_MEMORY)
    assert answer.code == 0, answer.told
    assert set(answer.document) == {"run_id", "run_folder", "ray_job"}
    run = RunFolder(answer.document["run_folder"])
    assert run.run_id == answer.document["run_id"]
    until(reached(run, 3), 90, "step 3")
    ranks = cluster.ask("status", run.run_id).document["ranks"]
    first, second = ranks[0]["node"], ranks[2]["node"]
    assert [rank["node"] for rank in ranks] == [first, first, second, second]
    assert first != second
    doomed = next(name for name in (node_of(ranks[0]["pid"]), node_of(ranks[2]["pid"])) if name != "head")
    killed_at = kill_rank(run, 2 if node_of(ranks[0]["pid"]) == doomed else 0)
    until(reached(run, 1, attempt=2), 30, "second attempt")
    print(f"seconds from kill to next step on two nodes: {recovery(run, killed_at, 2):.2f}")
    assert recovery(run, killed_at, 2) < 5

    copied = until(lambda: [event for event in events(run) if event["kind"] == "snapshots_copied"], 30, "copies")
    assert {event["data"]["step"] > 0 for event in copied} == {True}
    reached_step = max(line["step"] for line in metrics(run))
    lost_at = kill_node(doomed)
    until(reached(run, 1, attempt=3), 90, "third attempt")
    print(f"seconds from the loss of a node to the next step: {recovery(run, lost_at, 3):.1f}")
    restored = [event["data"]["step"] for event in events(run) if event["kind"] == "snapshot_restored"]
    began = min(line["step"] for line in metrics(run) if line["attempt"] == 3)
    print(f"a node was lost after step {reached_step}; restored from memory: {restored}")
    assert (restored[-1] + 1, len(restored)) == (began, 2)
    assert began > reached_step - 2

    os.kill(run.read_json("status.json")["controller"]["pid"], signal.SIGKILL)
    until(lambda: cluster.ask("status", run.run_id).document["state"] == "orphaned", 10, "orphan")
    heard = max(line["step"] for line in metrics(run) if line["attempt"] == 3)
    resumed = cluster("resume", run.run_id, "train.eval_interval=0")
    assert resumed.code == 0, resumed.told
    assert resumed.document["ray_job"] != answer.document["ray_job"]
    until(lambda: cluster.ask("status", run.run_id).document["state"] == "done", 90, "end of the run")
    status = cluster.ask("status", run.run_id).document
    assert (status["where"], status["step"], kinds(run)[-1]) == ("cluster", STEPS, "run_done")
    assert_same_curve(run, reference)
    third, fourth = ([line["step"] for line in metrics(run) if line["attempt"] == attempt] for attempt in (3, 4))
    print(f"the controller was killed after step {heard}; its ranks left after step {max(third)}")
    assert sorted(third + fourth) == list(range(min(third), STEPS + 1))
    assert heard <= max(third) < STEPS
    assert cluster.ask("checkpoint", "verify", run.run_id).code == 0


def events(run: RunFolder) -> list[dict[str, Any]]:
    return list(run.read_lines("events.jsonl"))
