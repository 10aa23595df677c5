"""Why a plan is what it is: where its time and memory go, and what each neighbour one knob away would change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from jobs.spec import JobSpec, LayoutSpec
from parallel.capabilities import why_refused
from parallel.estimates.copies import busiest_rank
from parallel.estimates.costs import estimate_time
from parallel.estimates.hardware import Hardware
from parallel.estimates.loads import LOADS, Recorded
from parallel.estimates.memory import estimate_memory
from parallel.estimates.software import Software
from parallel.estimates.workload import Workload
from parallel.layout import ATTENTION_AXES
from parallel.planning.options import recompute_label, recomputed, variants
from parallel.planning.planner import Plan, price, resolve, step_of


@dataclass(frozen=True)
class Neighbour:
    """The chosen plan with one knob turned: what it would be, or the rule that stops it."""

    change: tuple[tuple[str, Any, Any], ...]
    """Fields of LayoutSpec with their value before and after."""
    obstacle: str | None
    """The engine's rule that it breaks, with the numbers; None where only memory may stop it."""
    plan: Plan | None
    """None where there is an obstacle."""
    seconds_gained: float
    """A step, against the chosen plan; below 0 it is slower."""
    missing_bytes: int
    """Beyond a device's memory; 0: it fits."""

    @property
    def label(self) -> str:
        """`tp 2 -> 1, dp 4 -> 8`."""
        if self.change[0][0] == "recompute":
            kinds, modules = (side[1:] for side in self.change)
            before, after = (recompute_label(*side) for side in zip(kinds, modules, strict=True))
            return f"recompute {before} -> {after}"
        shown = ((name, *map(_shown, sides)) for name, *sides in self.change)
        return ", ".join(f"{name} {before} -> {after}" for name, before, after in shown)

    def as_dict(self) -> dict[str, Any]:
        return {
            "change": {name: after for name, _, after in self.change},
            "obstacle": self.obstacle,
            "step_seconds": self.plan and self.plan.time.total,
            "memory_bytes": self.plan and self.plan.memory.total,
            "seconds_gained": self.seconds_gained if self.plan else None,
            "missing_bytes": self.missing_bytes if self.plan else None,
        }


@dataclass(frozen=True)
class Routing:
    """The chosen plan, were tokens routed like this; it is priced with `recorded`, or else with `natural`."""

    load: str
    busiest: float
    """Tokens of the busiest expert-parallel rank over the mean, before experts are shared."""
    step_seconds: float
    memory_bytes: int
    p_out_of_memory: float


@dataclass(frozen=True)
class Explanation:
    """`time` and `memory` sum to the plan's step and to its memory, the largest part first."""

    time: dict[str, float]
    memory: dict[str, int]
    routing: tuple[Routing, ...]
    """From even to a step's worst of a hundred; empty where every rank has all experts."""
    neighbours: tuple[Neighbour, ...]
    """Those that run and fit, fastest first; then those that memory stops, likewise; then those that a rule stops."""

    @property
    def held_back(self) -> Neighbour | None:
        """The fastest of those that more memory would allow and that are faster than the plan."""
        short = (each for each in self.neighbours if each.missing_bytes and each.seconds_gained > 0)
        return next(short, None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "time_seconds": self.time,
            "memory_bytes": self.memory,
            "routing": [asdict(routing) for routing in self.routing],
            "neighbours": [neighbour.as_dict() for neighbour in self.neighbours],
        }


def explain(job: JobSpec, plan: Plan, device: Hardware, run_by: Software | None = None) -> Explanation:
    """Of a plan of `job` on `device`, priced with `run_by` where that is given.

    What the job fixes is turned too: it may be what holds the plan back.
    """
    chosen = resolve(job, plan)
    neighbours = [_neighbour(chosen, changes, plan, device, run_by) for changes in _turns(chosen)]
    neighbours.sort(key=lambda each: (each.obstacle is not None, each.missing_bytes > 0, -each.seconds_gained))
    time, memory = (_largest_first(asdict(estimate)) for estimate in (plan.time, plan.memory))
    return Explanation(time, memory, tuple(_routings(step_of(job, plan), plan, device, run_by)), tuple(neighbours))


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _largest_first(parts: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(((name, part) for name, part in parts.items() if part), key=lambda part: -part[1]))


def _routings(step: Workload, plan: Plan, device: Hardware, run_by: Software | None) -> Iterator[Routing]:
    if plan.layout.ep == 1:
        return
    cases: dict[str, Workload] = {load: replace(step, load=load) for load in LOADS}
    if isinstance(step.load, Recorded):
        cases["recorded"] = step
    for load, routed in cases.items():
        seconds = estimate_time(routed, device, run_by).total + plan.time.unexplained
        memory = estimate_memory(routed, device)
        chance = memory.p_out_of_memory(device.memory_bytes)
        yield Routing(load, busiest_rank(routed), seconds, memory.total, chance)


def _neighbour(
    chosen: JobSpec, changes: dict[str, Any], plan: Plan, device: Hardware, run_by: Software | None
) -> Neighbour:
    """`chosen` has every degree and the micro-batch given."""
    turned = chosen.model_copy(update={"layout": chosen.layout.model_copy(update=changes)})
    change = tuple((name, getattr(chosen.layout, name), getattr(turned.layout, name)) for name in changes)
    obstacle = why_refused(turned)
    if obstacle is not None:
        return Neighbour(change, obstacle, None, 0.0, 0)
    found = price(turned, device, run_by)
    missing = max(0, found.memory.total - device.memory_bytes)
    # What no part explains of the plan's step is not held against the neighbour's.
    gained = plan.time.total - plan.time.unexplained - found.time.total
    return Neighbour(change, None, found, gained, missing)


def _turns(chosen: JobSpec) -> Iterator[dict[str, Any]]:
    """Changes of LayoutSpec, each one knob. Of two degrees, one is doubled and the other, which makes room, halved."""
    layout = chosen.layout
    degrees = layout.degrees
    for more in ATTENTION_AXES:
        for less in ATTENTION_AXES:
            # A pipeline that ends has no virtual stages.
            ends = {"vpp": 1} if less == "pp" and degrees["pp"] == 2 and degrees["vpp"] > 1 else {}
            if more != less and degrees[less] % 2 == 0:
                yield {more: 2 * degrees[more], less: degrees[less] // 2, **ends}
    if chosen.model.is_moe:
        yield from _experts_turned(degrees)
        yield from ({"dispatcher": other} for other in _others(layout, "dispatcher"))
        if degrees["ep"] > 1:
            yield from ({"expert_parallelism": other} for other in _others(layout, "expert_parallelism"))
    for name, value in (("micro_batch", layout.micro_batch or 1), ("vpp", degrees["vpp"])):
        if name == "micro_batch" or degrees["pp"] > 1:
            yield {name: 2 * value}
            if value % 2 == 0:
                yield {name: value // 2}
    stage = layout.options["zero_stage"]
    yield from ({"zero_stage": other} for other in _others(layout, "zero_stage") if abs(other - stage) == 1)
    for name in ("offload_optimizer", "offload_parameters"):
        yield {name: "cpu" if layout.options[name] == "none" else "none"}
    if layout.offload_activations is not None:
        yield {"offload_activations": None}
    else:  # which computes again what it must
        stays = {} if layout.options["recompute"] == "none" else {"recompute": "none"}
        yield {"offload_activations": "auto", **stays}
    yield {"optimizer_replicas": 2 * layout.options["optimizer_replicas"]}
    free = chosen.model_copy(
        update={"layout": layout.model_copy(update={"recompute": None, "recompute_modules": None})}
    )
    for variant in variants(free):
        turn = {name: variant.layout.options[name] for name in ("recompute", "recompute_modules")}
        # One module more or less, all, or none.
        before, after = recomputed(layout), recomputed(variant.layout)
        if before != after and (turn["recompute"] != "selective" or (before < after or after < before)):
            yield turn


def _experts_turned(degrees: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Replicas of experts (edp) take up what ep or etp leaves, or one of these the other's."""
    for more, less in (("ep", "etp"), ("etp", "ep")):
        yield {more: 2 * degrees[more]}
        if degrees[less] % 2 == 0:
            yield {less: degrees[less] // 2}
            yield {more: 2 * degrees[more], less: degrees[less] // 2}


def _others(layout: LayoutSpec, name: str) -> list[Any]:
    """Values of a field of LayoutSpec that it does not have."""
    given = get_args(LayoutSpec.model_fields[name].annotation)
    values = [value for each in given for value in get_args(each) or (each,) if value is not type(None)]
    return [value for value in values if value != getattr(layout, name)]
