"""Another layout for a run that cannot go on at its own: what is trained stays as it is, to the sample."""

from __future__ import annotations

from dataclasses import replace
from operator import mul

from jobs.errors import InputError
from jobs.spec import DEGREES, SIMPLEST, JobSpec
from parallel.estimates.hardware import Hardware
from parallel.layout import Layout
from parallel.planning import planner

_LESS = 0.9
"""Of the memory that the layout which ran out of it was thought to need."""
_WORTH_A_RESTART = 1 / 30
"""Of a step."""


def needing_less_memory(job: JobSpec) -> JobSpec | None:
    """The fastest that should need a tenth less memory a device than the job's own; None where there is none.

    One of the same degrees, if there is any: then every rank's state stays where it is.
    """
    device = planner.device_of(job)
    smaller = replace(device, memory_bytes=int(_LESS * planner.price(job, device).memory.total))
    divided_alike = free(job, but=DEGREES)
    for freed in (divided_alike, free(job)):
        if plans := _plans(freed, smaller):
            return planner.resolve(freed, plans[0])
    return None


def relieving(job: JobSpec, rank: int, slower: float) -> JobSpec | None:
    """The same layout with other numbers of layers a stage, where one of the ranks computes more slowly than its peers.

    slower: 0.2 is a fifth longer. The longest stage is made as short as it can be, layers being alike; None where that
    gains less than a thirtieth.
    """
    layout = Layout.of(job.layout)
    if layout.pp == 1 or layout.vpp > 1:
        return None
    cost = [1.0] * layout.pp
    cost[layout.coordinates(rank)["pp"]] += slower
    now = layout.stage_layers or (job.model.layers // layout.pp,) * layout.pp
    best = [1] * layout.pp
    for _ in range(job.model.layers - layout.pp):  # each next layer to where it makes the least of the longest
        best[min(range(layout.pp), key=lambda stage: (best[stage] + 1) * cost[stage])] += 1
    longest, before = (max(map(mul, layers, cost)) for layers in (best, now))
    if longest > before * (1 - _WORTH_A_RESTART):
        return None
    relieved = job.model_copy(update={"layout": job.layout.model_copy(update={"stage_layers": tuple(best)})})
    return relieved if _plans(relieved) else None


def on_nodes(job: JobSpec, nodes: int) -> JobSpec | None:
    """The fastest on so many nodes, or on fewer where the job runs on no layout of them; None where on none."""
    for count in range(nodes, 0, -1):
        cluster = job.cluster.model_copy(update={"nodes": count})
        fewer = free(job.model_copy(update={"cluster": cluster}))
        if plans := _plans(fewer):
            return planner.resolve(fewer, plans[0])
    return None


def free(job: JobSpec, but: tuple[str, ...] = ()) -> JobSpec:
    """The job with all to be planned that a plan decides. What is on NVMe stays there: no plan offers that."""
    decided = (name for name in (*DEGREES, "micro_batch", *SIMPLEST) if name not in but)
    planned = [name for name in decided if getattr(job.layout, name) != "nvme"]
    if not but:
        planned.append("stage_layers")
    return job.model_copy(update={"layout": job.layout.model_copy(update=dict.fromkeys(planned))})


def _plans(job: JobSpec, device: Hardware | None = None) -> tuple[planner.Plan, ...]:
    try:
        return planner.plan_job(job, device).plans
    except InputError:  # nothing runs or fits
        return ()
