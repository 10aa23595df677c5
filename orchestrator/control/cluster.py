"""The machines of one run as the controller sees them: node agents on Ray. The only place that talks to Ray."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from jobs.errors import InputError
from jobs.spec import ClusterSpec, JobSpec
from orchestrator.messages import Event, RankLaunch, Report
from orchestrator.run_folder import RunFolder

_CONNECT_SECONDS = 3.0
_POLL_WAIT_SECONDS = 1.0
_SILENT_SECONDS = 10.0
"""Without an answer to a poll that an agent should have answered: it is stopped, or its machine is gone."""
_CALLS_AT_ONCE = 8
"""That an agent serves: a poll, what the controller asks, what two other agents ask about copies."""
_OBEY_SECONDS = 60.0
"""For an agent to do what it is asked; ending ranks may take half of that."""


class Cluster:
    """Node agents of a run, one a node, reserved together. Node `i` hosts the ranks of the i-th block of devices."""

    def __init__(self, run: RunFolder, job: JobSpec, where: Literal["here", "cluster"]) -> None:
        self._run, self._job, self._where = run, job, where
        self._group: Any = None
        self._session = ""
        self._agents: list[Any] = []  # None where one is to be started
        self._polls: dict[Any, int] = {}
        self._asked: dict[int, float] = {}  # by agent: when its outstanding poll was sent
        self._gone: set[int] = set()
        self._silent: set[int] = set()
        self._preparing: dict[Any, int] = {}
        self._node_ids: dict[str, str] = {}
        self._left_out: list[str] = []
        self.nodes: list[str] = []
        self.checks: dict[str, dict[str, Any]] = {}

    def connect(self) -> None:
        """Start Ray on this machine, or join the cluster that this process is a job of; a second run finds it there.

        Ray sets signal handlers of its own; those that stand are put back.
        """
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default, without its notice on stderr
        import ray

        if ray.is_initialized():
            return
        spec = self._job.cluster
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if self._where == "cluster":
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
        else:
            ray.init(
                address="local",
                num_cpus=spec.nodes,
                num_gpus=_gpus(spec),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def take(self, job: JobSpec) -> None:
        """Serve this job from the next request or launch on."""
        self._job = job

    def leave_out(self, nodes: set[str]) -> None:
        """Nodes, by their names, that later requests are not to be granted."""
        self._left_out = [self._node_ids[name] for name in nodes]

    def available(self) -> int:
        """Nodes of the cluster that are alive, not left out, and have what a node of the job needs."""
        import ray

        need = _need(self._job.cluster)
        return sum(
            node["Alive"]
            and node["NodeID"] not in self._left_out
            and all(node["Resources"].get(kind, 0) >= count for kind, count in need.items())
            for node in ray.nodes()
        )

    def request(self) -> None:
        """Ask Ray for all nodes at once, or for others in place of those that were lost; `granted` tells of them."""
        from ray.util.placement_group import placement_group

        if self._group is not None:
            return  # whose lost nodes Ray replaces by itself
        count = self._job.cluster.nodes
        others = {"ray.io/node-id": f"!in({','.join(self._left_out)})"}
        self._group = placement_group(
            [_need(self._job.cluster)] * count,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[others] * count if self._left_out else None,
        )
        self._session = secrets.token_hex(4)
        self._agents, self.nodes = [None] * count, [""] * count

    def granted(self, wait_seconds: float) -> bool:
        import ray
        from ray.util.placement_group import placement_group_table

        if not self._group.wait(wait_seconds):
            return False
        # For some seconds after a node's death the group seems whole.
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return set(placement_group_table(self._group)["bundles_to_node_id"].values()) <= alive

    def start_agents(self) -> None:
        """Create the agents that are missing and have them warm their zygotes; `prepare` waits for that."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from orchestrator.node.agent import NodeAgent

        actor = ray.remote(NodeAgent)
        for index in [index for index, agent in enumerate(self._agents) if agent is None]:
            agent = actor.options(
                num_cpus=1,
                num_gpus=_gpus(self._job.cluster),
                max_concurrency=_CALLS_AT_ONCE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            ).remote(self._run.place, index, self._session, self._job.model_dump(mode="json"))
            self._agents[index] = agent
            self._preparing[agent.prepare.remote()] = index

    def prepare(self, wait_seconds: float) -> bool:
        """Whether every agent is ready to launch ranks; `nodes` then holds their names."""
        import ray
        from ray.exceptions import RayActorError

        done, waiting = ray.wait(list(self._preparing), num_returns=len(self._preparing), timeout=wait_seconds)
        for future in done:
            index = self._preparing.pop(future)
            try:
                name, node, self.checks[name] = ray.get(future)
            except RayActorError:
                self._agents[index] = None
            else:
                self._node_ids[name], self.nodes[index] = node, name
        if not waiting and None not in self._agents:
            self._join_peers()
        if None in self._agents:  # lost before all were ready
            self.start_agents()
        return not self._preparing

    def _join_peers(self) -> None:
        """Each node's snapshots are copied to the next one."""
        import ray
        from ray.exceptions import RayActorError

        count = len(self._agents)
        for index, agent in enumerate(self._agents if count > 1 else []):
            peer = (index + 1) % count
            try:
                ray.get(agent.send_copies_to.remote(self._agents[peer], self.nodes[peer]))
            except RayActorError:
                self._agents[index] = None

    def drop_lost(self, node: str | None) -> None:
        """Give back this node and all that are gone; the others keep what they hold in memory."""
        import ray

        if self._silent or node is None:  # one that is silent would be granted again
            self.release()
            return
        for index in self._gone | {self.nodes.index(node)}:
            ray.kill(self._agents[index])
            self._agents[index] = None
            self._polls = {poll: of for poll, of in self._polls.items() if of != index}
        self._gone = set()

    def open_store(self) -> tuple[str, int]:
        import ray

        address, port = ray.get(self._agents[0].open_store.remote())
        return str(address), int(port)

    def launch(self, launches: Sequence[RankLaunch]) -> None:
        import ray

        per_node = self._job.cluster.devices_per_node
        blocks: dict[int, list[dict[str, Any]]] = {}
        for launch in launches:
            blocks.setdefault(launch.rank // per_node, []).append(launch.model_dump(mode="json"))
        ray.get([self._agents[index].launch.remote(block) for index, block in blocks.items()])

    def poll(self, timeout_seconds: float) -> list[Report]:
        """What any agent has to tell; a lost agent is told as an event of kind `node_lost`."""
        import ray
        from ray.exceptions import RayError

        waited_for = set(self._polls.values())
        for index, agent in enumerate(self._agents):
            if index not in waited_for and index not in self._gone:
                self._polls[agent.poll.remote(_POLL_WAIT_SECONDS)] = index
                self._asked[index] = time.monotonic()
        done, _ = ray.wait(list(self._polls), num_returns=1, timeout=timeout_seconds)
        if done:
            done, _ = ray.wait(list(self._polls), num_returns=len(self._polls), timeout=0)
        found: list[Report] = []
        for future in done:
            index = self._polls.pop(future)
            node = self.nodes[index]
            try:
                found += ray.get(future)
            except RayError as error:
                self._gone.add(index)
                text = f"the agent of {node} is gone, {self._ranks(node)}: {str(error).splitlines()[0]}"
                found.append(Event(kind="node_lost", message=text, node=node))
        for index in set(self._polls.values()) - self._silent:
            silent = time.monotonic() - self._asked[index] - _POLL_WAIT_SECONDS
            if silent > _SILENT_SECONDS:
                self._silent.add(index)
                node = self.nodes[index]
                text = f"the agent of {node}, {self._ranks(node)}, has not answered for {silent:.1f} s"
                found.append(Event(kind="node_lost", message=text, node=node))
        return found

    def _ranks(self, node: str) -> str:
        per_node = self._job.cluster.devices_per_node
        first = self.nodes.index(node) * per_node
        return f"with ranks {first} to {first + per_node - 1}" if per_node > 1 else f"with rank {first}"

    def ask_to_stop(self) -> None:
        self._all("ask_to_stop")

    def kill_ranks(self) -> None:
        """End every rank on every node that still answers; returns when they are gone."""
        self._all("kill")

    def forget_from(self, step: int) -> None:
        """No state of this step or later that is in a node's memory is to be taken up."""
        self._all("forget_from", step)

    def release(self) -> None:
        """Give every node back. Detached groups leak, so this one is removed whatever happened before."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        self._all("close")
        for agent in filter(None, self._agents):
            ray.kill(agent)
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._agents, self._polls, self._preparing = None, [], {}, {}
        self._gone, self._silent, self.checks = set(), set(), {}

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        """Call every agent that answers; those that are gone are `poll`'s to tell."""
        import ray
        from ray.exceptions import RayError

        asked = [agent for index, agent in enumerate(self._agents) if agent is not None and index not in self._silent]
        answers = []
        for future in [getattr(agent, method).remote(*arguments) for agent in asked]:
            with contextlib.suppress(RayError):
                answers.append(ray.get(future, timeout=_OBEY_SECONDS))
        return answers


def check_embedded(spec: ClusterSpec) -> None:
    """Refuse, before anything is started, what this one machine cannot run."""
    if spec.nodes > 1:
        raise InputError(
            "cluster.nodes",
            spec.nodes,
            "`run` trains on this one machine; `submit` goes to a Ray cluster of several",
            1,
        )
    if spec.device == "cuda" and spec.devices_per_node > (here := local_gpus()):
        rule = f"cluster {spec.name} needs {spec.devices_per_node} GPUs, this machine has {here}"
        raise InputError("cluster.devices_per_node", spec.devices_per_node, rule, here or "cluster=laptop")


def local_gpus() -> int:
    """GPUs that a process started here may use, without importing torch or opening a device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return (
        len(found) if visible is None else min(len(found), len([part for part in visible.split(",") if part.strip()]))
    )


def check_cluster(address: str | None, spec: ClusterSpec) -> Any:
    """A job client of the Ray cluster at `address`, once it answers and could ever hold the job."""
    if not address:
        raise InputError("RAY_ADDRESS", "", "is not set; `submit` needs a Ray cluster's address", "127.0.0.1:6379")
    _check_answers(address)
    _use_token()
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        nodes = _cluster_nodes(client)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise InputError("RAY_ADDRESS", address, f"does not accept jobs: {str(error).splitlines()[0]}") from None
    fitting = sum(1 for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= _gpus(spec))
    if fitting < spec.nodes:
        need = f"{_gpus(spec)} GPUs each" if _gpus(spec) else "a CPU each"
        have = f"of the {len(nodes)} at {address} {fitting} have that"
        rule = f"cluster {spec.name} needs {spec.nodes} nodes with {need}; {have}"
        raise InputError("cluster.nodes", spec.nodes, rule, fitting or None)
    return client


def _use_token() -> None:
    """Authenticate by the token of this machine, if it has one, as `ray` on the command line does."""
    kept = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if "RAY_AUTH_TOKEN" in os.environ or kept.exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _need(spec: ClusterSpec) -> dict[str, float]:
    """Resources of one node, in Ray's terms."""
    return {"CPU": 1, "GPU": _gpus(spec)} if _gpus(spec) else {"CPU": 1}


def _gpus(spec: ClusterSpec) -> int:
    return spec.devices_per_node if spec.device == "cuda" else 0


def _cluster_nodes(client: Any) -> list[dict[str, float]]:
    """Resources of each live node, from the state API of the cluster's head."""
    from ray.util.state import list_nodes

    found = list_nodes(address=client.get_address(), limit=10_000, raise_on_missing_output=False)
    return [dict(node.resources_total) for node in found if node.state == "ALIVE"]


def _check_answers(address: str) -> None:
    """Connect to host:port once: Ray itself would retry a wrong address for minutes."""
    try:
        parsed = urlparse(address if "://" in address else f"ray://{address}")
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
        if not parsed.hostname:
            raise ValueError("no host name in it")
    except ValueError as error:
        raise InputError(
            "RAY_ADDRESS", address, f"is not host:port or http://host:port: {error}", "127.0.0.1:6379"
        ) from None
    try:
        socket.create_connection((parsed.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError("RAY_ADDRESS", address, f"does not answer: {error.strerror or error}") from None
