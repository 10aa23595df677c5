"""Faults that are injected on purpose, each at a chosen (rank, step) or at a point of a checkpoint's files. Pure."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from jobs.architecture import Spec

RankFault = Literal[
    "exception",
    "kill",
    "stop",
    "terminate",
    "segfault",
    "held_lock",
    "skipped_collective",
    "livelock",
    "nan",
    "exploding_loss",
    "out_of_memory",
    "slow_compute",
    "slow_data",
    "slow_network",
    "zygote_killed",
]
"""Of one rank, in a phase of a step; an exploding loss is of all. Slowness lasts `steps`; the others are over at once,
or never."""

SaveFault = Literal["save_killed", "disk_full", "storage_error", "storage_stall"]
"""Of one rank, at the `point`-th file that it opens for writing or renames in checkpoints, from `step` on."""

ControlFault = Literal["agent_killed", "controller_killed", "byte_flipped", "truncated", "deleted"]
"""From outside the ranks. The last three damage the first checkpoint written from `step` on, and kill `rank` so that it
is read again."""

FaultKind = RankFault | SaveFault | ControlFault
RANK_FAULTS: tuple[RankFault, ...] = get_args(RankFault)
SAVE_FAULTS: tuple[SaveFault, ...] = get_args(SaveFault)
CONTROL_FAULTS: tuple[ControlFault, ...] = get_args(ControlFault)
KINDS: tuple[FaultKind, ...] = (*RANK_FAULTS, *SAVE_FAULTS, *CONTROL_FAULTS)


class Injection(Spec):
    """One fault; it happens once a run, however often its step is trained."""

    kind: FaultKind
    rank: int = Field(0, ge=0)
    step: int = Field(1, ge=1)
    phase: Literal["data", "compute", "agree"] = Field("compute", description="of the step, for faults of a rank")
    point: int = Field(1, ge=1, description="which write or rename of checkpoint files, for faults of saving")
    moment: Literal["nodes_ready", "training_started", "checkpoint_written", "attempt_failed", "restarting"] = Field(
        "checkpoint_written", description="event at which the controller is killed"
    )
    factor: float = Field(2.0, gt=1, description="slow_compute: of the rank's own compute; exploding_loss: of its rate")
    seconds: float = Field(0.05, gt=0, description="slow_data: a step; slow_network: a collective; storage_stall: once")
    steps: int = Field(20, ge=1, description="for how many steps a rank is slow")

    @property
    def text(self) -> str:
        """`slow_compute x1.2 of rank 1 at step 7`."""
        what = f"{self.kind} x{self.factor:g}" if self.kind == "slow_compute" else self.kind
        return f"{what} of rank {self.rank} at step {self.step}"
