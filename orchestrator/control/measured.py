"""What layouts came to that were run to be measured: a line each in `measured.jsonl` of the run root, kept for later.

A line holds the workload as estimates see it, what ran it and on what, and the outcome. Calibrations are made of them:
those of one device and one software version belong together, whatever job they were measured for.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.run_folder import RunFolder, is_url, readable
from parallel.estimates.software import OURS
from parallel.estimates.workload import Workload
from parallel.planning.planner import device_of

if TYPE_CHECKING:
    from parallel.evidence.calibration import Observation

FILE = "measured.jsonl"
VERSIONS = {"megatron": OURS, "deepspeed": "Fivefold on DeepSpeed 0.19.8"}
"""What trains with each engine, whose releases are pinned."""

Outcome = Literal["ran", "out of memory", "hung", "failed"]


class Measured(BaseModel):
    """One layout that was run, for whatever it came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: float = Field(default_factory=time.time, description="Unix seconds at its end")
    run_id: str
    job: str = Field(description="the job's name")
    device: str = Field(description="name of the devices' profile")
    version: str = Field(description="what ran it, of VERSIONS")
    workload: Workload
    outcome: Outcome
    reason: str = ""
    predicted_seconds: float = Field(gt=0, description="a step's, from the profile alone")
    believed_seconds: float = Field(gt=0, description="the same with all that had been measured when it was run")
    seconds: float | None = Field(None, gt=0, description="a step's, the median after the first ones; where it ran")
    deviation: float = Field(0.0, ge=0, description="of the logarithm of seconds, by how those steps differ")
    memory_bytes: int | None = Field(None, gt=0, description="peak of the fullest rank's tensors; where it ran")

    @property
    def observation(self) -> Observation:
        from parallel.evidence.calibration import Observation

        return Observation(
            workload=self.workload,
            seconds=self.seconds,
            deviation=self.deviation,
            memory_bytes=self.memory_bytes,
            out_of_memory=self.outcome == "out of memory",
        )


class Store:
    """The lines of one run root that tell of a job's devices and of what it is run by."""

    def __init__(self, root: str, job: JobSpec) -> None:
        self._root, self._cluster = root, job.cluster
        self.device = device_of(job).name
        self.version = VERSIONS[job.engine]
        self.rows = [row for row in self._read() if self._is_like(row)]
        """Oldest first."""

    @property
    def observations(self) -> list[Observation]:
        return [row.observation for row in self.rows]

    def add(self, row: Measured) -> None:
        """Keep it, at once."""
        folder = RunFolder(self._root)
        folder.append(FILE, [row.model_dump(mode="json")])
        folder.flush()
        self.rows.append(row)

    def _is_like(self, row: Measured) -> bool:
        """Ranks share a machine's cores and memory where it has no GPUs: only as many ranks are alike."""
        same = (row.device, row.version) == (self.device, self.version)
        shared = self._cluster.device == "cpu"
        return same and not (shared and row.workload.devices_per_node != self._cluster.devices_per_node)

    def _read(self) -> list[Measured]:
        # Where nothing was measured, planning needs no filesystems.
        if not is_url(self._root) and not Path(self._root, FILE).expanduser().is_file():
            return []
        found, folder = [], RunFolder(self._root)
        with readable(folder.place):
            lines = list(folder.read_lines(FILE))
        for number, line in enumerate(lines, 1):
            try:
                found.append(Measured.model_validate(line))
            except (ValidationError, InputError) as error:
                rule = f"line {number} is no measured layout: {_first(error)}"
                raise InputError(folder.path(FILE), None, rule, "a file without that line") from None
        return found


def _first(error: ValidationError | InputError) -> str:
    """What is wrong, in a line."""
    if isinstance(error, InputError):
        return str(error)
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
