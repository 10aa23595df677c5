"""The tables that `fivefold plan` prints."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.spec import JobSpec
from orchestrator.control.display import bytes_text, print_table
from parallel.estimates.hardware import Hardware
from parallel.planning.budget import Budget
from parallel.planning.explanation import Explanation, Neighbour
from parallel.planning.planner import Plan, Planning
from parallel.planning.shapes import Shape
from parallel.planning.what_if import numbers


def planning(job: JobSpec, found: Planning, top: int, budget: Budget | None, measured: int) -> None:
    """The fastest layouts, by how many measured ones, then why the others were left out."""
    plans = found.plans
    print(_heading(job))
    print(f"{found.considered} candidates, {len(plans)} fit; the first is what `run` and `submit` take")
    if measured:
        print(f"calibrated by {measured} layouts that were run on such devices")
    print()
    rows = [
        [
            str(place),
            plan.label,
            str(plan.micro_batch),
            str(plan.micro_batches),
            f"{plan.time.total * 1e3:,.0f} ms",
            f"{plan.interval[0] * 1e3:,.0f} .. {plan.interval[1] * 1e3:,.0f}",
            *_speed(plan),
            bytes_text(plan.memory.total),
            *_spent(plan, job, budget),
        ]
        for place, plan in enumerate(plans[:top], 1)
    ]
    names = ("micro-batch", "count", "step", "nine of ten", "tokens/s", "MFU", "memory", *_spent_headings(budget))
    print_table(None, [("", True), ("layout", False), *((name, True) for name in names)], rows)
    if found.rejections:
        print()
        left_out = [[str(rejection.count), rejection.example] for rejection in found.rejections]
        print_table(None, [("left out", True), ("because, for example", False)], left_out)


def what_if(best: Plan, before: Plan | None, own: Hardware, device: Hardware) -> None:
    """What was assumed, and how much faster the best plan is for it."""
    was, assumed = dict(numbers(own)), dict(numbers(device))
    print()
    for name in (name for name in was if was[name] != assumed[name]):
        print(f"what if  {name} were {_number(name, assumed[name])}, not {_number(name, was[name])}")
    if before is None:
        print(f"         then {best.label} is best; as it is, nothing fits")
    else:
        print(f"         then {best.label} is best, {_against(best.time.total, before.time.total)}", end=" ")
        print(f"that of {before.label}, the best as it is")


def explanation(plan: Plan, found: Explanation) -> None:
    """Where a step's time and a device's memory go, and the neighbours."""
    print(f"\nwhy {plan.label}, micro-batch {plan.micro_batch}\n")
    total, held = plan.time.total, plan.memory.total
    rows = [[name, f"{part * 1e3:,.1f} ms", f"{part / total:.1%}"] for name, part in found.time.items()]
    print_table(None, _parts("time of a step"), [*rows, ["total", f"{total * 1e3:,.1f} ms", "100.0%"]])
    print()
    rows = [[name, bytes_text(part), f"{part / held:.1%}"] for name, part in found.memory.items()]
    print_table(None, _parts("memory of a device"), [*rows, ["total", bytes_text(held), "100.0%"]])
    print()
    if found.routing:
        rows = [
            [
                each.load,
                f"{each.busiest:.2f}",
                f"{each.step_seconds * 1e3:,.1f} ms",
                bytes_text(each.memory_bytes),
                f"{each.p_out_of_memory:.0%}",
            ]
            for each in found.routing
        ]
        headings = ("busiest rank", "step", "memory", "out of memory")
        print_table(None, [("routing", False), *((name, True) for name in headings)], rows)
        print()
    rows = [[each.label, _step(each, total), _obstacle(each)] for each in found.neighbours]
    print_table(None, [("one change", False), ("step", True), ("stopped by", False)], rows)
    near = found.held_back
    if near is not None and near.plan is not None:
        print(f"\n{bytes_text(near.missing_bytes)} more would allow {near.label}:", end=" ")
        print(f"{_against(near.plan.time.total, total)} this plan's")


def shapes(job: JobSpec, found: Sequence[Shape], top: int, budget: Budget | None) -> None:
    """The fastest shapes, then why the others were left out."""
    ranked = [(shape, shape.plan) for shape in found if shape.plan is not None]
    print(_heading(job))
    print(f"{len(found)} shapes, {len(ranked)} run and are as large as the job's model; fastest first")
    print()
    keys = [key.removeprefix("model.") for key in found[0].values]
    rows = [
        [
            str(place),
            *shape.values.values(),
            _billions(shape.parameters),
            _billions(shape.active_parameters),
            plan.label,
            *_speed(plan),
            *_spent(plan, job, budget),
        ]
        for place, (shape, plan) in enumerate(ranked[:top], 1)
    ]
    names = ("tokens/s", "MFU", *_spent_headings(budget))
    headings = [("", True), *((name, True) for name in (*keys, "parameters", "active")), ("best layout", False)]
    print_table(None, [*headings, *((name, True) for name in names)], rows)
    left_out = [[*shape.values.values(), shape.reason or ""] for shape in found if shape.plan is None]
    if left_out:
        print()
        print_table(None, [*((key, True) for key in keys), ("left out because", False)], left_out)


def _parts(what: str) -> list[tuple[str, bool]]:
    return [(what, False), ("", True), ("share", True)]


def _heading(job: JobSpec) -> str:
    cluster = job.cluster
    return f"{job.name} on {cluster.nodes} x {cluster.devices_per_node} {cluster.hardware}, {job.train.precision}"


def _speed(plan: Plan) -> list[str]:
    return [f"{plan.tokens_per_second:,.0f}", "-" if plan.mfu is None else f"{plan.mfu:.1%}"]


def _spent_headings(budget: Budget | None) -> list[str]:
    return [] if budget is None else ["days"] if budget.price is None else ["days", "cost"]


def _spent(plan: Plan, job: JobSpec, budget: Budget | None) -> list[str]:
    if budget is None:
        return []
    cost = budget.cost(plan, job.cluster.devices)
    return [f"{budget.days(plan):,.1f}", *([] if cost is None else [f"{cost:,.0f}"])]


def _billions(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e9:,.2f} B"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    return bytes_text(value) if name.endswith("_bytes") else f"{value:.4g}"


def _step(neighbour: Neighbour, total: float) -> str:
    return "-" if neighbour.plan is None else f"{neighbour.plan.time.total / total - 1:+.1%}"


def _obstacle(neighbour: Neighbour) -> str:
    if neighbour.obstacle is not None:
        return neighbour.obstacle
    return f"memory: {bytes_text(neighbour.missing_bytes)} short" if neighbour.missing_bytes else ""


def _against(seconds: float, other: float) -> str:
    """Of two steps' lengths: `a step 6.0% shorter than`."""
    change = seconds / other - 1
    return f"a step {abs(change):.1%} {'longer' if change > 0 else 'shorter'} than"
