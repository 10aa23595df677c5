"""One per machine: a thin Ray actor that owns the rank processes of one run, not their training. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.spec import JobSpec
from orchestrator.messages import PACKET_BYTES, Event, RankLaunch, Report, parse_report
from orchestrator.node import evidence
from orchestrator.node.copies import Copies
from orchestrator.node.watch import Reading, Watch
from orchestrator.pulse import Pulses, new_page
from orchestrator.run_folder import RunFolder
from orchestrator.snapshot_memory import Header, forget_from

_KILL_SECONDS = 30.0
_LOG_UPLOAD_SECONDS = 10.0
_LOOK_SECONDS = 0.5


class NodeAgent:
    """Every method is called by the controller, through Ray; `poll` waits while the others are served."""

    def __init__(self, run_place: str, index: int, session: str, job: dict[str, Any]) -> None:
        self._run = RunFolder(run_place)
        self._job = JobSpec.model_validate(job)
        self._node, self._session = f"{socket.gethostname()}-{index}", session
        self._address = _own_address()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._live: dict[int, int] = {}  # rank -> pid
        self._pulses: dict[int, Pulses] = {}
        self._memories: dict[int, int] = {}  # rank -> descriptor of its snapshots, which outlive it
        self._copies = Copies(self._memories, self._reports.put)
        self._watch, self._attempt, self._stalled = Watch(), 0, False
        self._changed = threading.Condition()
        self._log_folder = self._run.local or Path(tempfile.mkdtemp(prefix="fivefold-logs-"))

    def prepare(self) -> tuple[str, str, dict[str, Any]]:
        """Wait until earlier ranks of this run are gone from this machine, then warm a zygote.

        Returns this node's name, its id in Ray, and what it can do (worker/preflight.py).
        """
        lock = self._lock_machine(self._job.policy.grace_seconds + _KILL_SECONDS)
        ours, zygotes = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inherited = [zygotes.fileno(), writing.fileno(), lock]
        subprocess.run(
            [
                sys.executable,
                "-m",
                "orchestrator.node.zygote",
                self._job.engine,
                self._job.cluster.device,
                str(self._job.policy.grace_seconds),
                self._run.place,
                *map(str, inherited),
            ],
            pass_fds=inherited,
            env=_rank_environment(self._job),
            check=True,
        )
        for end in (zygotes, writing):
            end.close()
        os.close(lock)
        self._zygote = ours
        ready = self._zygote.recv(PACKET_BYTES)
        if not ready:
            raise RuntimeError(f"the zygote on {self._node} died while it imported the engine; see Ray's worker log")
        found = self._check()
        threading.Thread(target=self._keep_watch, daemon=True).start()
        for read, source in ((self._read_zygote, ours), (self._read_ranks, reading)):
            threading.Thread(target=read, args=(source,), daemon=True).start()
        if self._run.local is None:
            threading.Thread(target=self._upload_logs, daemon=True).start()
        return self._node, _own_id(), found

    def _check(self) -> dict[str, Any]:
        self._zygote.send(json.dumps({"kind": "preflight", "folder": str(self._log_folder)}).encode())
        answer = self._zygote.recv(PACKET_BYTES)
        found: dict[str, Any] | None = json.loads(answer)["found"] if answer else None
        if found is None:
            raise RuntimeError(f"{self._node} fails at a matrix product, a copy or a file; see Ray's worker log")
        return found

    def open_store(self) -> tuple[str, int]:
        """A listening socket for the next attempt's rendezvous, so that its port is nobody else's. Rank 0 serves it."""
        self._store = socket.create_server((self._address, 0), backlog=1024)
        return self._address, self._store.getsockname()[1]

    def launch(self, launches: list[dict[str, Any]]) -> None:
        """Fork these ranks. Exits and reports come through `poll`."""
        for record in launches:
            launch = RankLaunch.model_validate(record)
            log = self._log_folder / log_name(launch.attempt, launch.rank)
            message = {"kind": "fork", "launch": record, "log": str(log)}
            if launch.attempt != self._attempt:
                self._attempt, self._stalled = launch.attempt, False
                self._pulses.clear()
                self._watch.begin()
            page = new_page()
            self._pulses[launch.rank] = Pulses(page)
            if launch.rank not in self._memories:
                memory = os.memfd_create("fivefold-snapshots")
                self._copies.fetch(launch.rank, memory)
                self._memories[launch.rank] = memory
            descriptors = [page, self._memories[launch.rank]]
            if launch.rank == 0:
                descriptors.append(self._store.fileno())
            with self._changed:
                self._live[launch.rank] = 0
            socket.send_fds(self._zygote, [json.dumps(message).encode()], descriptors)
            os.close(page)
            if launch.rank == 0:
                self._store.close()

    def send_copies_to(self, peer: Any, name: str) -> None:
        """Another node's agent keeps a copy of this one's snapshots from now on; it may have the lost node's."""
        self._copies.send_to(peer, name)

    def keep_copy(self, rank: int, size: int, content: bytes, offset: int) -> None:
        self._copies.keep(rank, size, content, offset)

    def keep_copy_header(self, rank: int, place: int, header: Header) -> None:
        self._copies.keep_header(rank, place, header)

    def kept(self, rank: int) -> tuple[int, list[Header]]:
        return self._copies.kept(rank)

    def read_copy(self, rank: int, offset: int, length: int) -> bytes:
        return self._copies.read(rank, offset, length)

    def forget_from(self, step: int) -> None:
        """No snapshot of this step or later is to be taken up, here or where it is copied to."""
        for memory in self._memories.values():
            forget_from(memory, step)
        self._copies.forget_from(step)

    def poll(self, wait_seconds: float) -> list[Report]:
        """Reports and events since the last poll, as soon as there are any."""
        found: list[Report] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._reports.get(timeout=wait_seconds))
            while True:
                found.append(self._reports.get_nowait())
        return found

    def ask_to_stop(self) -> None:
        """Ask every rank to write a checkpoint at its next step and leave."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every rank now; returns when all are gone, and with them their memory."""
        self._signal(signal.SIGKILL)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._live, timeout=_KILL_SECONDS):
                raise RuntimeError(f"ranks {sorted(self._live)} on {self._node} survive SIGKILL")

    def close(self) -> None:
        """End what is left and upload the last lines of the logs."""
        self.kill()
        if self._run.local is None:
            self._upload_new_logs({})

    def _lock_machine(self, patience_seconds: float) -> int:
        """Descriptor of a lock that the zygote and all its ranks hold, taken once no earlier session's is held.

        The kernel frees a lock when its last holder ends, however it ends, so no two controllers of a run (one that
        was killed, one that resumes) ever train on one machine at once. Agents of one session may share a machine.
        """
        folder = Path(tempfile.gettempdir()) / f"fivefold-{os.getuid()}" / self._run.run_id
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + patience_seconds
        for earlier in folder.glob("*.lock"):
            if not earlier.name.startswith(self._session):
                _wait_until_free(earlier, deadline)
                earlier.unlink(missing_ok=True)
        descriptor = os.open(folder / f"{self._session}-{self._node}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def _signal(self, number: int) -> None:
        self._zygote.send(json.dumps({"kind": "signal", "signal": int(number)}).encode())

    def _keep_watch(self) -> None:
        """Tell, once an attempt, of a rank that hangs; every rank's stack is in the run folder before that."""
        last = time.monotonic()
        while True:
            time.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            # This process was stopped itself, as with its whole machine: everything seems to have taken long.
            asleep, last = now - last > 4 * _LOOK_SECONDS, now
            pids = dict(self._live)
            pages = {rank: self._pulses.get(rank) for rank, pid in pids.items() if pid}
            beats = {rank: page.read() for rank, page in pages.items() if page is not None}
            readings = {rank: Reading(beat, _is_stopped(pids[rank])) for rank, beat in beats.items() if beat}
            stall = None if asleep else self._watch.look(now, readings)
            told, self._stalled = self._stalled, stall is not None
            if stall is None or told:
                continue
            folder = self._log_folder / f"logs/attempt-{self._attempt}"
            evidence.gather({rank: pid for rank, pid in pids.items() if pid}, folder)
            data = {"kind": stall.kind, **asdict(stall.beat), "seconds": stall.seconds, "limit_seconds": stall.limit}
            self._reports.put(
                Event(
                    kind="rank_hung",
                    message=f"{stall.text}; stacks in {folder}",
                    attempt=self._attempt,
                    rank=stall.rank,
                    node=self._node,
                    data=data,
                )
            )

    def _read_zygote(self, source: socket.socket) -> None:
        for packet in _packets(source):
            message = json.loads(packet)
            rank, pid = message["rank"], message["pid"]
            with self._changed:
                if message["kind"] == "forked":
                    self._live[rank] = pid
                else:
                    self._live.pop(rank, None)
                self._changed.notify_all()
            self._reports.put(_lifecycle(message, self._node))
        # PR_SET_PDEATHSIG has ended its ranks with it.
        self._reports.put(Event(kind="zygote_lost", message=f"the zygote on {self._node} died", node=self._node))

    def _read_ranks(self, source: socket.socket) -> None:
        for packet in _packets(source):
            report = parse_report(packet)
            if isinstance(report, Event):
                report = report.model_copy(update={"node": self._node})
            self._reports.put(report)

    def _upload_logs(self) -> None:
        uploaded: dict[str, int] = {}
        while True:
            time.sleep(_LOG_UPLOAD_SECONDS)
            self._upload_new_logs(uploaded)

    def _upload_new_logs(self, uploaded: dict[str, int]) -> None:
        for log in sorted(self._log_folder.glob("logs/*/*.*")):
            name, size = str(log.relative_to(self._log_folder)), log.stat().st_size
            if uploaded.get(name) != size:
                self._run.upload(log, name)
                uploaded[name] = size


def _packets(source: socket.socket) -> Iterator[bytes]:
    """What arrives, until the other end is gone; reset where it left something unread."""
    with contextlib.suppress(ConnectionResetError):
        while packet := source.recv(PACKET_BYTES):
            yield packet


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has just ended, which the zygote tells
        return False
    return state in "Tt"


def log_name(attempt: int, rank: int) -> str:
    return f"logs/attempt-{attempt}/rank-{rank}.log"


def _lifecycle(message: dict[str, Any], node: str) -> Event:
    rank, pid, attempt = message["rank"], message["pid"], message["attempt"]
    if message["kind"] == "forked":
        text, data = f"rank {rank} started as pid {pid} on {node}", {"pid": pid}
        return Event(kind="rank_started", message=text, attempt=attempt, rank=rank, node=node, data=data)
    code = message["code"]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    data = {"pid": pid, "code": code}
    return Event(kind="rank_exited", message=f"rank {rank} {how}", attempt=attempt, rank=rank, node=node, data=data)


def _wait_until_free(lock: Path, deadline: float) -> None:
    with contextlib.suppress(FileNotFoundError), lock.open("r+") as file:  # another agent of ours may have removed it
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"ranks of an earlier session of this run are still alive and hold {lock}"
                    ) from None
                time.sleep(0.02)


def _rank_environment(job: JobSpec) -> dict[str, str]:
    """The environment of the zygote, and so of every rank: one thread a CPU rank, and this project's packages first."""
    environment = dict(os.environ)
    project = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([project, *filter(None, [environment.get("PYTHONPATH")])])
    environment["PYTHONUNBUFFERED"] = "1"
    environment["GLOO_SOCKET_IFNAME"] = _interface()
    if job.cluster.device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that an import cannot initialise CUDA before the fork
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron's overlap of TP collectives relies on launch order
    return environment


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _own_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _interface() -> str:
    """Network interface that carries this node's Ray address, so that gloo binds to the cluster's network only."""
    import psutil

    address = _own_address()
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    return "lo"
