"""What crosses a process boundary: pure data, JSON on the wire, the same words in every file of a run folder."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from jobs.spec import JobSpec

PACKET_BYTES = 1 << 20
"""Room for one message between the processes of a node."""

LEFT_ON_REQUEST = 75
"""Exit code of a rank that wrote a checkpoint and left because it was asked to (EX_TEMPFAIL)."""


class Message(BaseModel):
    """Its JSON writes NaN and Infinity by name: a loss that has diverged must arrive as what it is."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class RankLaunch(Message):
    """What one rank needs to start. `store_port` is already listening when ranks are forked; rank 0 serves it."""

    run_id: str
    attempt: int
    rank: int
    local_rank: int
    store_address: str
    store_port: int
    run_folder: str
    job: JobSpec
    checkpoint_steps: tuple[int, ...] = Field(description="checkpoints to resume from, best first; none: start afresh")
    injections: tuple[int, ...] = Field((), description="places in job.injections of faults that have yet to happen")


class StepReport(Message):
    """One rank's account of one step. Loss and gradient norm are global: the same number on every rank."""

    type: Literal["step"] = "step"
    attempt: int
    rank: int
    step: int = Field(description="steps trained when it ended; the first step of a run is 1")
    loss: float = Field(description="mean over the step's tokens, nats")
    grad_norm: float
    learning_rate: float
    tokens: int = Field(description="of the whole step, over all ranks")
    step_seconds: float
    phase_seconds: dict[str, float] = Field(default_factory=dict, description="data, compute, checkpoint, evaluate")
    waited_seconds: dict[str, float] = Field(
        default_factory=dict, description="of compute, in collectives, by the axes of their group: `dp cp`"
    )
    routed_rows: int | None = Field(None, description="that this rank's experts computed; null: it has none")
    expert_loads: dict[int, list[int]] | None = Field(
        None, description="tokens of each expert over all ranks, by layer of this rank's stage: now and then, from one"
    )
    memory_bytes: int = Field(description="peak: device memory on CUDA, resident set on CPU")
    validation_loss: float | None = None
    at: float = Field(default_factory=time.time, description="Unix seconds at its end")


class Event(Message):
    """An append-only fact. `kind` is what programs read, `message` what people read."""

    type: Literal["event"] = "event"
    kind: str
    message: str
    at: float = Field(default_factory=time.time, description="Unix seconds")
    attempt: int = 0
    rank: int | None = None
    node: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)


Report = StepReport | Event
_reports: TypeAdapter[Report] = TypeAdapter(Report)


def parse_report(line: bytes | str) -> Report:
    return _reports.validate_json(line)


class Restart(Message):
    """Decision: end the attempt and start the next, a while later, from the newest good checkpoint."""

    reason: str
    delay_seconds: float = 0.0


class Replan(Message):
    """Decision: as `Restart`, at a layout that needs less memory."""

    reason: str


class Stop(Message):
    """Decision: end the run in `state`."""

    state: Literal["done", "failed", "cancelled", "interrupted"]
    reason: str


Decision = Restart | Replan | Stop
