"""The training loop of one rank, written once for every engine. Runs in a process forked from the zygote; no ray."""

from __future__ import annotations

import itertools
import math
import resource
import signal
import time
import traceback
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from jobs.errors import InputError
from orchestrator.messages import LEFT_ON_REQUEST, RankLaunch, StepReport
from orchestrator.pulse import Phase, Pulse
from orchestrator.worker.faults import Faults
from orchestrator.worker.reporter import Reporter

if TYPE_CHECKING:
    from orchestrator.worker.engines.protocol import Engine


def import_engine(engine: str, device: str) -> ModuleType:
    """Everything that takes seconds to import, before ranks are forked. Gives the engine's module."""
    import torch.distributed  # noqa: F401

    from orchestrator.worker import (  # noqa: F401
        checkpoint,
        collectives_seen,
        data,
        memory_check,
        preflight,
        schedule,
        snapshots,
    )

    if engine == "deepspeed":
        from orchestrator.worker.engines import deepspeed

        return deepspeed
    if device == "cpu":
        from orchestrator.worker.engines import cuda_stand_in

        cuda_stand_in.install()
    from orchestrator.worker.engines import megatron

    return megatron


def measure(device: str, folder: Path) -> dict[str, Any]:
    """What this node can do at this moment."""
    from orchestrator.worker import preflight

    return preflight.measure(device, folder)


def run(launch: RankLaunch, report_fd: int, pulse_fd: int, memory_fd: int, store_fd: int | None = None) -> int:
    """Train from the newest good checkpoint to the last step. Returns the exit code."""
    stopping = StopRequest()
    reporter, pulse = Reporter(launch, report_fd), Pulse(pulse_fd)
    try:
        return _Rank(launch, reporter, pulse, stopping, memory_fd, store_fd).train()
    except InputError as error:
        reporter.event("input_error", str(error))
        traceback.print_exc()
        return 2
    except BaseException as error:
        cause = _cause(error)
        first_line = str(cause).strip().splitlines()[0] if str(cause).strip() else ""
        reporter.event("rank_failed", f"{type(cause).__name__}: {first_line}", traceback=traceback.format_exc()[-6000:])
        traceback.print_exc()
        return 1


def _cause(error: BaseException) -> BaseException:
    """What some rank raised while saving: torch raises it on all, within an exception that is no Exception."""
    failures: dict[int, tuple[BaseException, object]] = getattr(error, "failures", {})
    return next((raised for raised, _ in failures.values()), error)


class StopRequest:
    """Set by SIGTERM; honoured by all ranks together at the end of a step."""

    def __init__(self) -> None:
        self.made = False
        signal.signal(signal.SIGTERM, self._make)

    def _make(self, number: int, frame: FrameType | None) -> None:
        self.made = True


class _Rank:
    def __init__(
        self,
        launch: RankLaunch,
        reporter: Reporter,
        pulse: Pulse,
        stopping: StopRequest,
        memory_fd: int,
        store_fd: int | None,
    ) -> None:
        import torch

        from orchestrator.worker import determinism
        from orchestrator.worker.collectives_seen import CollectivesSeen
        from parallel.layout import Layout

        self._launch, self._job, self._reporter, self._stopping = launch, launch.job, reporter, stopping
        self._torch, self._pulse, self._faults = torch, pulse, Faults(launch, reporter, pulse)
        self._layout = Layout.of(self._job.layout)
        if self._job.train.deterministic:
            determinism.allow()
            determinism.enforce()
        if self._job.cluster.device == "cuda":
            self._device = torch.device("cuda", launch.local_rank)
            torch.cuda.set_device(self._device)
        else:
            self._device = torch.device("cpu")
        self._memory_fd = memory_fd
        self._join(store_fd)
        self._seen = CollectivesSeen(pulse, self._layout, launch.rank)
        self._seen.install()

    def train(self) -> int:
        from orchestrator.worker import data, schedule
        from orchestrator.worker.checkpoint import Checkpoints
        from orchestrator.worker.engines.swapping import SwapNotices
        from orchestrator.worker.memory_check import MemoryCheck
        from orchestrator.worker.snapshots import Snapshots

        job, layout, train = self._job, self._layout, self._job.train
        at = ", ".join(f"{axis} {index}" for axis, index in layout.coordinates(self._launch.rank).items())
        print(f"attempt {self._launch.attempt}: rank {self._launch.rank} of {layout.world} ({at}) on {self._device}")
        began = time.monotonic()
        self._pulse.enter("build")
        engine = import_engine(job.engine, self._device.type).build(job, layout, self._device)
        built = time.monotonic()
        self._pulse.enter("restore")
        text = data.open_data(job.data, train, job.model.vocab)
        checkpoints = Checkpoints(self._launch, layout, self._reporter)
        snapshots = Snapshots(self._launch, self._memory_fd, self._reporter)
        engine.before_update = snapshots.finish
        kept = snapshots.restore(engine, above=max(self._launch.checkpoint_steps, default=0))
        start = checkpoints.restore(engine) if kept is None else kept
        if start == 0 and job.init_from is not None:
            self._read_weights(engine, job.init_from)
        restored = time.monotonic()
        dp_rank = layout.coordinates(self._launch.rank)["dp"]
        micro_batch = job.layout.micro_batch
        assert micro_batch is not None, "job.json is resolved before it is run"
        memory = MemoryCheck(self._launch, layout, self._device, self._reporter)
        if job.plan_memory and start < train.steps:
            memory.rehearse(engine, text.batches(start + 1, dp_rank, layout.dp, micro_batch), start)
        if self._launch.rank == 0:
            self._reporter.event(
                "training_started",
                f"training from step {start + 1} of {train.steps}",
                start_step=start,
                from_memory=kept is not None,
                init_from=job.init_from,
                parameters=engine.parameters,
                unigram_entropy=text.unigram_entropy,
                train_tokens=text.train_tokens,
                build_seconds=built - began,
                restore_seconds=restored - built,
            )
        swapped = SwapNotices(job, self._launch.rank)
        unsaved: list[StepReport] = []
        left = False
        for step in range(start + 1, train.steps + 1):
            clock = [time.monotonic()]
            self._enter("data", step)
            batches = text.batches(step, dp_rank, layout.dp, micro_batch)
            clock.append(time.monotonic())
            self._enter("compute", step)
            rate = schedule.learning_rate(train, step)
            self._seen.take()
            with memory.checked():
                result = engine.train_step(step, self._faults.learning_rate(rate), batches)
            clock.append(time.monotonic())
            waited = self._seen.take()
            last = step == train.steps
            validation_loss = None
            if train.eval_batches and (last or (train.eval_interval and step % train.eval_interval == 0)):
                self._enter("evaluate", step)
                held_out = [
                    batch
                    for index in range(train.eval_batches)
                    for batch in text.validation_batches(index, dp_rank, layout.dp, micro_batch)
                ]
                validation_loss = engine.evaluate(held_out)
            clock.append(time.monotonic())
            phases = dict(zip(("data", "compute", "evaluate"), _intervals(clock), strict=True))
            report = StepReport(
                attempt=self._launch.attempt,
                rank=self._launch.rank,
                step=step,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=rate,
                tokens=train.global_batch * train.sequence_length,
                step_seconds=phases["data"] + phases["compute"],
                phase_seconds=phases,
                waited_seconds=waited,
                routed_rows=result.routed_rows,
                expert_loads=result.expert_loads,
                memory_bytes=self._peak_memory(),
                validation_loss=validation_loss,
            )
            self._reporter.send(report)
            for kind, message, facts in swapped.of(result.swapped, phases["compute"]):
                self._reporter.event(kind, message, **facts)
            print(f"step {step}  loss {result.loss:.6f}  grad norm {result.grad_norm:.6f}  {report.step_seconds:.3f} s")
            unsaved.append(report)
            self._enter("agree", step)
            stop, busy = self._agree(snapshots.busy)
            every = job.checkpoint.interval
            sound = math.isfinite(result.loss) and math.isfinite(result.grad_norm)  # or nothing of it is to be kept
            if every and sound and (last or stop or step % every == 0):
                self._enter("checkpoint", step)
                with self._faults.saving(step):
                    saved = checkpoints.save(engine, step, unsaved)
                if saved:
                    unsaved.clear()
            left = stop and not last
            if left:
                break
            if sound and not last and not busy:
                snapshots.begin(engine, step)
        snapshots.finish()
        self._pulse.enter("checkpoint")
        checkpoints.close()
        self._pulse.enter("end")
        return LEFT_ON_REQUEST if left else 0

    def _read_weights(self, engine: Engine, folder: str) -> None:
        from models.huggingface import source

        began = time.monotonic()
        engine.set_weights(source(folder, self._job.model))
        if self._launch.rank == 0:
            seconds = time.monotonic() - began
            self._reporter.event("weights_read", f"weights read from {folder} in {seconds:.2f} s", seconds=seconds)

    def _join(self, store_fd: int | None) -> None:
        """Rendezvous over the store whose socket the agent of the first node opened."""
        import torch.distributed as dist

        launch = self._launch
        store = dist.TCPStore(
            launch.store_address,
            launch.store_port,
            self._layout.world,
            is_master=launch.rank == 0,
            master_listen_fd=store_fd,
            wait_for_workers=False,
        )
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=self._layout.world,
            device_id=self._device if self._device.type == "cuda" else None,
        )

    def _agree(self, busy: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether any is busy: one sum, so that all do the same next."""
        if self._faults.skips_collective():
            return False, True
        asked = self._torch.tensor([int(self._stopping.made), int(busy)])
        self._torch.distributed.all_reduce(asked)
        stop, any_busy = asked.tolist()
        return stop > 0, any_busy > 0

    def _enter(self, phase: Phase, step: int) -> None:
        self._pulse.enter(phase, step)
        self._faults.enter(phase, step)

    def _peak_memory(self) -> int:
        if self._device.type == "cuda":
            return int(self._torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _intervals(clock: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(clock)]
