"""Which of several model shapes of about equal size a cluster trains fastest (as Pangu Ultra MoE, 2025, was chosen)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.compose import amend, keys
from jobs.errors import InputError, closest
from jobs.spec import JobSpec
from parallel.estimates.hardware import Hardware
from parallel.planning.planner import Plan, plan_job

SIZE_TOLERANCE = 0.05
"""Share by which a shape may have more or fewer parameters than the job's own model and still be compared with it."""


@dataclass(frozen=True)
class Shape:
    """One point of a sweep: the swept keys' values, and the best plan of the job with them, or why there is none."""

    values: dict[str, str]
    parameters: int | None
    """None where the values make no model."""
    active_parameters: int | None
    plan: Plan | None
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "values": self.values,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "plan": self.plan and self.plan.as_dict(),
            "reason": self.reason,
        }


def sweep(job: JobSpec, ranges: Sequence[str], device: Hardware) -> list[Shape]:
    """Every combination of `model.hidden=4096,5120` ranges: the fastest first, then those without a plan.

    A shape is compared if it has as many parameters as the job's model, to SIZE_TOLERANCE. InputError for a range that
    is none, and where no shape is left.
    """
    swept = dict(_range(text) for text in ranges)
    shapes = [
        _shape(job, dict(zip(swept, values, strict=True)), device) for values in itertools.product(*swept.values())
    ]
    if not any(shape.plan for shape in shapes):
        nearest = min(
            (shape for shape in shapes if shape.parameters),
            key=lambda shape: abs((shape.parameters or 0) - job.model.parameters),
            default=None,
        )
        about = shapes[0] if nearest is None else nearest
        raise InputError("--sweep", " ".join(ranges), f"no shape has a plan: {_label(about)}: {about.reason}")
    return sorted(shapes, key=lambda shape: -shape.plan.tokens_per_second if shape.plan else 0.0)


def _range(text: str) -> tuple[str, list[str]]:
    key, given, values = text.partition("=")
    known = [name for name in keys() if name.startswith("model.")]
    if key not in known:
        leaf = next((name for name in known if name == f"model.{key}"), None)
        raise InputError("--sweep", text, "is no key of a model's shape", leaf or closest(key, known))
    found = [value for value in values.split(",") if value]
    if not given or not found:
        raise InputError("--sweep", text, "names no values; it has the form KEY=VALUE,VALUE", f"{key}=1,2")
    return key, found


def _shape(job: JobSpec, values: dict[str, str], device: Hardware) -> Shape:
    try:
        shaped = amend(job, [f"{key}={value}" for key, value in values.items()])
    except InputError as error:
        if error.path in values:  # wrong by itself, not beside the others
            raise
        return Shape(values, None, None, None, error.rule)
    size, active = shaped.model.parameters, shaped.model.active_parameters
    deviation = size / job.model.parameters - 1
    if abs(deviation) > SIZE_TOLERANCE:
        reason = f"{size / 1e9:.2f} B parameters are {deviation:+.0%} of the job's {job.model.parameters / 1e9:.2f} B"
        return Shape(values, size, active, None, reason)
    try:
        return Shape(values, size, active, plan_job(shaped, device).plans[0], None)
    except InputError as error:
        return Shape(values, size, active, None, str(error))


def _label(shape: Shape) -> str:
    return " ".join(f"{key.removeprefix('model.')}={value}" for key, value in shape.values.items())
