"""A Ray cluster of two nodes, both on this machine, and jobs that are handed to it."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from command import JOB, STEPS, Fivefold, Opened, assert_same_curve, kill_rank, kinds, metrics, reached, until
from command import seconds_to_next_step as recovery

from orchestrator.run_folder import RunFolder

TWO_NODES = ("cluster.nodes=2", "cluster.devices_per_node=2")
LONG_VALIDATIONS = ("train.eval_interval=1", "train.eval_batches=20")
"""They change nothing of the training; ranks that lose their controller notice it before the last step."""


@pytest.fixture
def cluster(opened: Opened) -> Iterator[Fivefold]:
    """`fivefold` with RAY_ADDRESS set to a cluster that asks for its token."""
    port, *others = free_ports(5)
    address = f"127.0.0.1:{port}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with opened(RAY_ADDRESS=address, **token) as fivefold, ExitStack() as nodes:
        head = [f"--port={port}", f"--dashboard-port={others[0]}", f"--ray-client-server-port={others[1]}"]
        start_node(fivefold, nodes, "--head", *head, f"--dashboard-agent-listen-port={others[2]}")
        until(lambda: answers(port) and answers(others[0]), 60, "head node")
        start_node(fivefold, nodes, f"--address={address}", f"--dashboard-agent-listen-port={others[3]}")
        yield fivefold


def start_node(fivefold: Fivefold, nodes: ExitStack, *options: str) -> None:
    ray = str(Path(sys.executable).with_name("ray"))
    common = ("--num-cpus=2", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0")
    environment = {name: text for name, text in fivefold.environment.items() if name != "RAY_ADDRESS"}
    with (fivefold.folder / "ray.out").open("ab") as output:
        node = subprocess.Popen(
            [ray, "start", "--block", "--disable-usage-stats", *common, *options],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    nodes.callback(node.wait, 20)
    nodes.callback(node.terminate)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_ranks_on_two_nodes_outlive_a_rank_and_the_run_its_controller(
    cluster: Fivefold, reference: dict[int, tuple[float, float]]
) -> None:
    submit = ("submit", JOB, *TWO_NODES, *LONG_VALIDATIONS)
    answer = until(lambda: (tried := cluster(*submit)).code == 0 and tried, 30, "second node")
    assert set(answer.document) == {"run_id", "run_folder", "ray_job"}
    run = RunFolder(answer.document["run_folder"])
    assert run.run_id == answer.document["run_id"]
    until(reached(run, 5), 90, "step 5")
    ranks = cluster.ask("status", run.run_id).document["ranks"]
    first, second = ranks[0]["node"], ranks[2]["node"]
    assert [rank["node"] for rank in ranks] == [first, first, second, second]
    assert first != second
    killed_at = kill_rank(run, 2)
    until(reached(run, 1, attempt=2), 30, "second attempt")
    print(f"seconds from kill to next step on two nodes: {recovery(run, killed_at, 2):.2f}")
    assert recovery(run, killed_at, 2) < 5

    os.kill(run.read_json("status.json")["controller"]["pid"], signal.SIGKILL)
    until(lambda: cluster.ask("status", run.run_id).document["state"] == "orphaned", 10, "orphan")
    heard = max(line["step"] for line in metrics(run) if line["attempt"] == 2)
    resumed = cluster("resume", run.run_id, "train.eval_interval=0")
    assert resumed.code == 0, resumed.told
    assert resumed.document["ray_job"] != answer.document["ray_job"]
    until(lambda: cluster.ask("status", run.run_id).document["state"] == "done", 90, "end of the run")
    status = cluster.ask("status", run.run_id).document
    assert (status["where"], status["step"], kinds(run)[-1]) == ("cluster", STEPS, "run_done")
    assert_same_curve(run, reference)
    second, third = ([line["step"] for line in metrics(run) if line["attempt"] == attempt] for attempt in (2, 3))
    print(f"the controller was killed after step {heard}; its ranks left after step {max(second)}")
    assert sorted(second + third) == list(range(min(second), STEPS + 1))
    assert heard <= max(second) < STEPS
    assert cluster.ask("checkpoint", "verify", run.run_id).code == 0
