"""What to say where no layout runs: why, class by class, and the nearest choice that does."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from math import log2
from typing import Any

from jobs.errors import InputError
from jobs.spec import DEGREES, SIMPLEST
from parallel.estimates.hardware import GIB
from parallel.estimates.memory import MemoryEstimate
from parallel.planning.search import Rejection, Search


def nothing_runs(search: Search, rejections: tuple[Rejection, ...]) -> InputError:
    """Why no layout of a search runs, class by class, and the nearest choice that does."""
    job = search.job
    nearest = _nearest_layouts(search)
    changed = {axis for change in nearest for axis in change}
    # What blames a degree to be changed is said first.
    ordered = sorted(rejections, key=lambda rejection: rejection.axis not in (*changed, None))
    if len(ordered) == 1:
        why = ordered[0].example
    else:
        classes = "; ".join(f"{rejection.example} ({rejection.key}: {rejection.count})" for rejection in ordered)
        why = f"no layout on {job.cluster.devices} devices runs: {classes}"
    if search.nearest_miss is not None:
        why += f"; of that {_largest_parts(search.nearest_miss)}"
    if changed:
        blamed = next((rejection.axis for rejection in ordered if rejection.axis in nearest[0]), None)
        axis = blamed or next(iter(nearest[0]))
        shown = [" ".join(f"{name}={degree}" for name, degree in change.items()) for change in nearest]
        return InputError(f"layout.{axis}", getattr(job.layout, axis), why, " or ".join(shown))
    cluster = _nearest_cluster(search)
    if cluster is None:
        return InputError("cluster", job.cluster.name, why)
    field, value = cluster
    return InputError(f"cluster.{field}", getattr(job.cluster, field), why, f"{field}={value}")


def _largest_parts(memory: MemoryEstimate) -> str:
    """The three that hold most."""
    parts = sorted(asdict(memory).items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in parts)


def _nearest_layouts(search: Search) -> list[dict[str, Any]]:
    """Changes to the fewest of the job's fixed degrees and options, by the smallest factors, with which it runs.

    At most three, nearest first; none if none help.
    """
    job = search.job
    given = {name: getattr(job.layout, name) for name in (*DEGREES, "micro_batch", *SIMPLEST)}
    fixed = {name: value for name, value in given.items() if value is not None}
    for number in range(1, len(fixed) + 1):
        found: dict[tuple[tuple[str, Any], ...], float] = {}
        # Of equally near choices the one that leaves the first degrees (tp before etp) as they are.
        for freed in itertools.combinations(reversed(fixed), number):
            relaxed = job.layout.model_copy(update=dict.fromkeys(freed))
            freer = Search(job.model_copy(update={"layout": relaxed}), search.device)
            for layout, fits in freer.fitting():
                for fit in fits:
                    chosen = {**fit.job.layout.options, **layout.as_dict(), "micro_batch": fit.workload.micro_batch}
                    change = tuple((name, chosen[name]) for name in fixed if name in freed)
                    found[change] = sum(_apart(name, fixed[name], value) for name, value in change)
        if found:
            return [dict(change) for change in sorted(found, key=lambda change: found[change])[:3]]
    return []


def _apart(name: str, before: Any, after: Any) -> float:
    """How far a change goes: a degree's doublings; an option is another, or the same."""
    return float(before != after) if name in SIMPLEST else abs(log2(after / before))


def _nearest_cluster(search: Search) -> tuple[str, int] | None:
    """Field of ClusterSpec to change and its nearest value that runs: more nodes for memory, else fewer devices.

    More nodes are 2, 3, 4, 6, 8, 12, ... 64 times as many.
    """
    cluster = search.job.cluster
    if search.nearest_miss is not None:
        factors = sorted({2**power for power in range(1, 7)} | {3 * 2**power for power in range(5)})
        choices = [("nodes", cluster.nodes * factor) for factor in factors]
    else:
        choices = [("nodes", nodes) for nodes in range(cluster.nodes - 1, 0, -1)]
        choices += [("devices_per_node", devices) for devices in range(cluster.devices_per_node - 1, 0, -1)]
    layout = search.job.layout
    # What holds least, where it is open: nothing interleaved, one sequence at a time.
    least = layout.model_copy(update={name: getattr(layout, name) or 1 for name in ("vpp", "micro_batch")})
    for field, value in choices:
        resized = search.job.model_copy(update={"layout": least, "cluster": cluster.model_copy(update={field: value})})
        if next(Search(resized, search.device).fitting(), None):
            return field, value
    return None
