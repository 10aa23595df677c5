"""One a job: observe what the agents tell, decide by the policies, act on the cluster. Imports no torch."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Literal

from jobs import corpus
from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator import manifests
from orchestrator.control import preflight, replanning
from orchestrator.control.divergence import Divergence
from orchestrator.control.machines import Machines
from orchestrator.control.policies import Failure, after_failure, blamed, failed_how, history, suspects
from orchestrator.control.record import RunRecord
from orchestrator.messages import (
    LEFT_ON_REQUEST,
    Decision,
    Event,
    RankLaunch,
    Replan,
    Report,
    Restart,
    StepReport,
    Stop,
)
from orchestrator.run_folder import RunFolder
from parallel.layout import Layout

_POLL_SECONDS = 0.25
_BLAME_SECONDS = 0.05
_CANCEL_LOCAL_SECONDS = 0.25
_CANCEL_REMOTE_SECONDS = 5.0
CANCEL_REQUEST = "requests/cancel"


class Controller:
    """Runs a job to its end, through as many attempts as its policy allows."""

    def __init__(self, job: JobSpec, record: RunRecord, machines: Machines) -> None:
        self._job, self._record, self._machines = job, record, machines
        self._layout = Layout.of(job.layout)
        self._failures = history(record.run.read_lines("events.jsonl"))
        self._divergence = Divergence()
        for line in record.run.read_lines("metrics.jsonl"):  # what was usual before this controller's time
            self._divergence.add(line["step"], line["loss"], line["grad_norm"])
        self._left_out: set[str] = set()
        self._stop_wanted: Literal["cancelled", "interrupted"] | None = None
        self._kill_wanted = False
        self._looked_for_cancel = 0.0
        from orchestrator.control.stragglers import Straggler, Stragglers  # with NumPy, which a plan does without

        self._stragglers, self._slow = Stragglers(self._layout), dict[tuple[int, str], Straggler]()
        self._slow_node: str | None = None
        self._relieved: JobSpec | None = None
        self._waiting: set[str | None] = set()
        """Nodes all of whose ranks wait for others, since the last step."""

    def interrupt(self) -> None:
        """Checkpoint and leave; asked twice: leave at once. Safe to call from a signal handler."""
        self._kill_wanted = self._stop_wanted is not None
        self._stop_wanted = "interrupted"

    def run(self) -> Stop:
        """Train until done, given up or asked to stop. The outcome is recorded before it is returned."""
        try:
            outcome = self._run()
        except InputError as error:
            self._record.end("failed", str(error))
            raise
        except BaseException as error:
            self._record.end("failed", f"the controller failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._machines.release()
        self._record.end(outcome.state, outcome.reason)
        return outcome

    def _run(self) -> Stop:
        corpus.check(self._job.data, self._job.train)
        self._machines.connect()
        outcome = self._acquire(self._job.policy.start_timeout_seconds)
        while outcome is None:
            decision = self._attempt()
            outcome = decision if isinstance(decision, Stop) else self._go_on(decision)
        return outcome

    def _go_on(self, decision: Restart | Replan) -> Stop | None:
        """Between two attempts: another layout, a pause, other nodes, as was decided."""
        policy, failed = self._job.policy, not (self._slow_node or self._relieved)
        node_lost = failed and self._failures[-1].kind == "node_lost"
        if isinstance(decision, Replan) and (job := replanning.needing_less_memory(self._job)):
            self._replan(job, "one that needs less memory")
        delay = decision.delay_seconds if isinstance(decision, Restart) else 0.0
        counted = sum(failure.kind != "preempted" for failure in self._failures)
        when = f", in {delay:.1f} s" if delay else ""
        self._tell("restarting", f"restart {counted} of at most {policy.max_restarts}{when}", reason=decision.reason)
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline:
            self._machines.poll(_POLL_SECONDS)
            self._record.confirm()
            if stop := self._stopped():
                return stop
        if self._relieved:
            self._replan(self._relieved, "less for a slow stage")
            self._relieved = None
        quarantined = self._quarantine(suspects(self._failures, policy))
        if not node_lost and not quarantined and not self._slow_node:
            return None
        if quarantined or self._slow_node:
            self._machines.release()
        else:
            self._machines.drop_lost(self._failures[-1].node)
        self._slow_node = None
        return self._acquire(
            policy.start_timeout_seconds if policy.on_node_lost == "wait" else policy.node_wait_seconds
        )

    def _quarantine(self, nodes: set[str]) -> bool:
        """Leave nodes out from now on, where the cluster has others: a suspect one is better than none."""
        new = (nodes & set(self._machines.nodes)) - self._left_out
        if not new:
            return False
        spare = self._machines.available() - self._job.cluster.nodes
        names = ", ".join(sorted(new))
        if spare < len(new):
            self._tell("suspect_node", f"{names}: is suspect, and the cluster has none in its place")
            return False
        self._left_out |= new
        self._machines.leave_out(self._left_out)
        self._tell("node_quarantined", f"{names}: left for another", nodes=sorted(new))
        return True

    def _replan(self, job: JobSpec, what: str) -> None:
        """Go on at another layout: what is trained is the same, to the sample."""
        before, self._job = self._layout, job
        self._layout = Layout.of(job.layout)
        self._stragglers = type(self._stragglers)(self._layout)
        self._record.run.write_json("job.json", job.model_dump(mode="json"))
        self._record.take_layout(self._layout)
        self._machines.take(job)
        text = f"{before.label} -> {self._layout.label}, micro-batch {job.layout.micro_batch}: {what}"
        self._tell("replanned", text, layout=job.layout.model_dump(mode="json"), nodes=job.cluster.nodes)

    def _acquire(self, patience_seconds: float) -> Stop | None:
        """Wait for all nodes of the job and warm their zygotes; None once they are ready to train what is left."""
        spec, policy = self._job.cluster, self._job.policy
        self._record.set_state("queued")
        self._record.ledger.switch("queue", time.time())
        self._tell("nodes_requested", f"waiting for {spec.nodes} x {spec.devices_per_node} {spec.device} devices")
        self._machines.request()
        deadline = time.monotonic() + patience_seconds
        while not self._machines.granted(_POLL_SECONDS):
            self._record.confirm()
            if stop := self._stopped():
                return stop
            if time.monotonic() > deadline:
                fewer = None
                if policy.on_node_lost == "replan":
                    fewer = replanning.on_nodes(self._job, min(self._machines.available(), spec.nodes - 1))
                if fewer is None:
                    return Stop(state="failed", reason=f"no devices within {patience_seconds:.0f} s")
                self._machines.release()
                self._replan(fewer, f"{fewer.cluster.nodes} of {spec.nodes} nodes are left")
                return self._acquire(policy.start_timeout_seconds)
        self._record.ledger.switch("restart", time.time())
        began = time.monotonic()
        self._machines.start_agents()
        while not self._machines.prepare(_POLL_SECONDS):
            self._record.confirm()
            if stop := self._stopped():
                return stop
        self._tell("nodes_ready", f"{', '.join(self._machines.nodes)} ready in {time.monotonic() - began:.1f} s")
        for node, found in self._machines.checks.items():
            self._record.event(
                Event(kind="preflight", message=f"{node}: {preflight.text(found)}", node=node, data=found)
            )
        wrong = preflight.suspects(self._machines.checks, time.time())
        for node, what in wrong.items():
            self._record.event(Event(kind="node_suspect", message=f"{node}: {what}", node=node))
        if self._quarantine(set(wrong)):
            self._machines.release()
            return self._acquire(patience_seconds)
        return self._catch_up()

    def _catch_up(self) -> Stop | None:
        """Tell of the steps that ranks trained and saved with their agent lost. They may be all that were left."""
        saved = manifests.whole(self._record.run)[::-1]
        for manifest in saved:
            self._record.catch_up(manifest.reports)
        if saved and saved[-1].step == self._job.train.steps:
            return Stop(state="done", reason=f"trained {saved[-1].step} steps")
        return None

    def _attempt(self) -> Decision:
        """One gang of ranks from launch to the exit of the last."""
        self._launch()
        exited: dict[int, int] = {}
        failure: Failure | None = None
        asked_at: float | None = None
        while len(exited) < self._layout.world:
            for report in self._machines.poll(_POLL_SECONDS):
                failure = blamed(failure, self._observe(report, exited))
            self._record.confirm()
            stop = self._stopped()
            if failure and not stop:
                return self._recover(failure)
            if (self._slow_node or self._relieved) and not stop:
                self._machines.kill_ranks()
                self._record.ledger.switch("restart", time.time())
                return Restart(reason="a rank is slower than its peers")
            if stop and asked_at is None:
                asked_at = time.monotonic()
                self._record.set_state("stopping", stop.reason)
                self._tell("stopping", f"{stop.reason}: writing a checkpoint, then leaving")
                self._machines.ask_to_stop()
            if stop and (
                failure or self._kill_wanted or time.monotonic() - (asked_at or 0) > self._job.policy.grace_seconds
            ):
                self._machines.kill_ranks()
                return stop
        if all(code == 0 for code in exited.values()):
            return Stop(state="done", reason=f"trained {self._record.step} steps")
        reason = "the ranks were asked from outside to save and leave"
        return self._stopped() or self._recover(Failure("preempted", reason, self._record.step, time.time()))

    def _launch(self) -> None:
        job, record = self._job, self._record
        for manifest in manifests.whole(record.run):
            manifests.check_job(manifest, job, record.run.place)
        per_node = job.cluster.devices_per_node
        ranks = range(self._layout.world)
        self._stragglers.begin()
        self._slow.clear()
        self._waiting.clear()
        record.begin_attempt({rank: self._machines.nodes[rank // per_node] for rank in ranks})
        address, port = self._machines.open_store()
        spent = injected(record.run)
        pending = tuple(place for place in range(len(job.injections)) if place not in spent)
        self._machines.launch(
            [
                RankLaunch(
                    run_id=record.run.run_id,
                    attempt=record.attempt,
                    rank=rank,
                    local_rank=rank % per_node,
                    store_address=address,
                    store_port=port,
                    run_folder=record.run.place,
                    job=job,
                    checkpoint_steps=tuple(manifests.steps(record.run)),
                    injections=pending,
                )
                for rank in ranks
            ]
        )

    def _observe(self, report: Report, exited: dict[int, int]) -> Failure | None:
        """Record a report; the failure that it tells of, if it does."""
        record = self._record
        if report.attempt not in (0, record.attempt):
            return None  # a rank of an attempt that is over
        if isinstance(report, StepReport):
            line = record.report(report)
            if line is None:
                return None
            self._waiting.clear()
            record.ledger.step(line["step"], line["at"], line["phase_seconds"]["data"], line["tokens"])
            self._compare_ranks(line["step"])
            return self._look_at_loss(line)
        record.event(report)
        if report.kind == "training_started":
            record.ledger.switch("productive", report.at)
            self._divergence.begin(report.data["start_step"])
        if report.kind == "rank_hung":
            record.ledger.switch("detect", report.at - report.data["seconds"])
        if report.kind in ("checkpoint_written", "checkpoint_staged"):
            record.ledger.stall(report.at, report.data["seconds"])
        if report.kind == "checkpoint_written":
            self._answer_slowness()
        if report.kind == "rank_exited":
            assert report.rank is not None
            exited[report.rank] = report.data["code"]
        return self._failure(report)

    def _compare_ranks(self, step: int) -> None:
        """Tell of a rank that has become slow, and keep what the heat map shows."""
        record = self._record
        slow = self._stragglers.add(record.reports)
        for straggler in slow:
            if (straggler.rank, straggler.cause) not in self._slow:
                record.event(
                    Event(kind="rank_slow", message=straggler.text, rank=straggler.rank, data=asdict(straggler))
                )
        self._slow = {(straggler.rank, straggler.cause): straggler for straggler in slow}
        if slower := self._stragglers.slower():
            record.run.append("ranks.jsonl", [{"step": step, "slower": slower}])

    def _answer_slowness(self) -> None:
        """At a checkpoint, where nothing is lost by it. Routing's slowness is no machine's."""
        policy, slow = self._job.policy.on_straggler, [each for each in self._slow.values() if each.cause != "routing"]
        if policy == "report" or not slow:
            return
        worst = max(slow, key=lambda each: each.lost)
        if policy == "replan" and worst.cause == "compute":
            self._relieved = replanning.relieving(self._job, worst.rank, worst.slower)
        node = self._machines.nodes[worst.rank // self._job.cluster.devices_per_node]
        if policy == "quarantine" and self._quarantine({node}):
            self._slow_node = node

    def _look_at_loss(self, line: dict[str, Any]) -> Failure | None:
        first = self._divergence.add(line["step"], line["loss"], line["grad_norm"])
        if first is None:
            return None
        text = f"the loss has diverged since step {first}: {line['loss']:.4g} nats at step {line['step']}"
        self._tell("diverged", text, step=first)
        return Failure("diverged", text, first, line["at"])

    def _failure(self, event: Event) -> Failure | None:
        step, at, node = self._record.step, event.at, event.node
        if event.kind == "input_error":
            return Failure("input_error", event.message, step, at)
        if event.kind == "rank_failed":
            how = failed_how(event.message)
            return Failure(how, f"rank {event.rank} failed: {event.message}", step, at, node)
        if event.kind == "rank_hung":
            if event.data["kind"] != "waiting":
                return Failure("rank_hung", event.message, step, at, node)
            # Where all ranks of a node wait, one of another node is to blame, whose agent tells that when it is sure.
            self._waiting |= {node}
            return (
                Failure("rank_waits", event.message, step, at) if self._waiting >= set(self._machines.nodes) else None
            )
        if event.kind in ("node_lost", "zygote_lost"):
            return Failure("node_lost", event.message, step, at, node)
        if event.kind == "rank_exited" and event.data["code"] not in (0, LEFT_ON_REQUEST):
            kind: Literal["rank_died", "rank_exited"] = "rank_died" if event.data["code"] < 0 else "rank_exited"
            return Failure(kind, event.message, step, at, node)
        return None

    def _recover(self, failure: Failure) -> Decision:
        """End a broken attempt, once what is to blame for it has had time to be told."""
        record, now = self._record, time.time()
        record.ledger.switch("detect", now)
        exited: dict[int, int] = {}
        deadline = time.monotonic() + _BLAME_SECONDS
        while failure.kind in ("rank_failed", "rank_exited") and time.monotonic() < deadline:
            for report in self._machines.poll(_BLAME_SECONDS):
                failure = blamed(failure, self._observe(report, exited)) or failure
        text = f"step {failure.step}: {failure.reason}"
        data = {"step": failure.step, "failure": failure.kind, "reason": failure.reason, "node": failure.node}
        self._tell("attempt_failed", text, **data)
        record.ledger.switch("restart", time.time())
        self._machines.kill_ranks()
        # A node that is gone is known to be once it was asked for something; ranks now die because they are killed.
        for report in self._machines.poll(_BLAME_SECONDS):
            other = self._observe(report, exited)
            if other and other.kind in ("input_error", "node_lost"):
                failure = blamed(failure, other) or failure
        if failure.kind == "diverged":
            self._forget_from(failure.step - 1)
        self._failures.append(failure)
        return after_failure(self._failures, self._job.policy)

    def _forget_from(self, step: int) -> None:
        """Remove what holds what a broken step made of the weights; what one shows, the one before did."""
        self._machines.forget_from(step)
        for spoilt in manifests.steps(self._record.run):
            if spoilt >= step:
                manifests.remove(self._record.run, spoilt)
                self._tell("checkpoint_removed", f"checkpoint at step {spoilt} holds a diverged state", step=spoilt)

    def _stopped(self) -> Stop | None:
        """Whether the user wants the run to end, by a signal or by `cancel`."""
        local = self._record.run.local is not None
        patience = _CANCEL_LOCAL_SECONDS if local else _CANCEL_REMOTE_SECONDS
        if self._stop_wanted is None and time.monotonic() - self._looked_for_cancel > patience:
            self._looked_for_cancel = time.monotonic()
            if self._record.run.exists(CANCEL_REQUEST):
                self._record.run.remove(CANCEL_REQUEST)
                self._stop_wanted = "cancelled"
        if self._stop_wanted is None:
            return None
        return Stop(state=self._stop_wanted, reason=f"{self._stop_wanted} at step {self._record.step}")

    def _tell(self, kind: str, message: str, **data: Any) -> None:
        self._record.event(Event(kind=kind, message=message, data=data))


def injected(run: RunFolder) -> set[int]:
    """Places in job.injections of the faults that have happened to this run."""
    events = run.read_lines("events.jsonl")
    return {event["data"]["injection"] for event in events if event["kind"] == "fault_injected"}


def cancel(run: RunFolder) -> None:
    """Leave a request that the run's controller finds, wherever it is."""
    run.write(CANCEL_REQUEST, b"")
